"""Small checkpoint files that ask for much: each ends in one sentence within 5 seconds and 64 MB + 1.2 times itself."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_makers import proving_state, whole
from measured import refused_cheaply
from omegaconf import OmegaConf

from fairseq_moe_ext.checkpoints.checkpoint import read_checkpoint
from fairseq_moe_ext.checkpoints.errors import CheckpointError
from fairseq_moe_ext.nllb.export import export_hf
from fairseq_moe_ext.serving import fairseq_hooks

KEY = "decoder.layers.1.moe_layer.experts.0.fc1.weight"


def doubled(made, depth: int = 60):
    """`made(x, x)` of itself, `depth` times: few objects, 2^depth when they are written out."""
    value = "x"
    for _ in range(depth):
        value = made(value, value)
    return value


def saved(content, **more) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **more)
    return buffer.getvalue()


def archive(
    changed: Callable[[str, bytes], bytes] | None = None, content=None, method=zipfile.ZIP_STORED, **more
) -> bytes:
    """A checkpoint's archive, each of its records gone through `changed`; more: name -> further records."""
    source = zipfile.ZipFile(io.BytesIO(saved(content or whole(proving_state(2)))))
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", method, compresslevel=1) as written:
        for name in source.namelist():
            data = source.read(name)
            written.writestr(name, data if changed is None else changed(name, data))
        for name, data in more.items():
            written.writestr(f"archive/{name}", data)
    return target.getvalue()


def with_pickle(text: bytes) -> bytes:
    """A checkpoint whose data.pkl is `text`."""
    return archive(lambda name, data: text if name.endswith("data.pkl") else data)


def made_of(*operations: bytes) -> bytes:
    """A pickle of {"model": {}, "extra_state": what the operations leave on the stack}."""
    model = b"}X\x05\x00\x00\x00model}sX\x0b\x00\x00\x00extra_state"
    return with_pickle(b"\x80\x02" + model + b"".join(operations) + b"s.")


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def doubled_tuples(depth: int) -> bytes:
    return b")" + b"".join(b"q%ch%c\x86" % (number, number) for number in range(depth))


def doubled_lists(depth: int) -> bytes:
    return b"]" + b"".join(b"q%c]h%cah%ca" % (number, number, number) for number in range(depth))


def with_config(**groups) -> bytes:
    return saved(whole(proving_state(2), **groups))


def with_model(**tensors) -> bytes:
    return saved(whole({**proving_state(2), **tensors}))


def recursive() -> dict:
    config = {"model": {"_name": "transformer_lm"}}
    config["again"] = config
    return config


def many_entries() -> bytes:
    """An archive whose list names 200,000 records, none of which lies in it."""
    plain = archive()
    end = plain.rindex(b"PK\x05\x06")
    entry = bytearray(46)
    entry[:4] = b"PK\x01\x02"
    entries = b"".join(bytes(entry[:28]) + struct.pack("<H", 6) + bytes(16) + b"%06d" % n for n in range(200_000))
    return plain[:end] + entries + struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 65535, 65535, len(entries), end, 0)


def unsized(data: bytes) -> bytes:
    """The archive with records that are said to be 1 GB long."""
    broken, place = bytearray(data), data.index(b"PK\x01\x02")
    while (place := data.find(b"PK\x01\x02", place)) >= 0:
        broken[place + 20 : place + 28] = struct.pack("<II", 1 << 30, 1 << 30)
        place += 46
    return bytes(broken)


def two_descriptions() -> bytes:
    """An archive with a description that readers find which do not look at letters' case."""
    source, target = zipfile.ZipFile(io.BytesIO(saved(whole(proving_state(2))))), io.BytesIO()
    records = {name: source.read(name) for name in source.namelist()}
    hostile = b"\x80\x02}X\x05\x00\x00\x00model}sX\x0b\x00\x00\x00extra_state}" + doubled_tuples(40) + b"Nss."
    with zipfile.ZipFile(target, "w") as written:
        for name in ("archive/version", "archive/DATA.pkl", *records, "archive/Data.pkl"):
            if name not in written.namelist():
                written.writestr(name, records.get(name, hostile))
    return target.getvalue()


def two_ends() -> bytes:
    """An archive whose end of 64 bits, which not every reader looks for, is another one than its end."""
    plain = saved(whole(proving_state(2)))
    place = plain.index(b"PK\x06\x07")
    return plain[: place + 8] + struct.pack("<Q", 100) + plain[place + 16 :]


def moved_list(data: bytes) -> bytes:
    """The archive with a list of records that is said to begin 8 bytes earlier."""
    moved, place = bytearray(data), data.index(b"PK\x06\x06")
    start = struct.unpack_from("<Q", data, place + 48)[0]
    moved[place + 48 : place + 56] = struct.pack("<Q", start - 8)
    return bytes(moved)


def numbers_of_one_hash(number: int) -> list[bytes]:
    """Opcodes of numbers that Python's hash does not tell apart."""
    return [b"\x8a\x10" + (each * ((1 << 61) - 1)).to_bytes(16, "little") for each in range(number)]


class Placed:
    """A tensor as its pickle describes it, in 15 values."""

    def __init__(self, start: int, shape: tuple, strides: tuple):
        self.arguments = torch.ones(15).storage(), start, shape, strides, False, OrderedDict()

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, self.arguments


FILES: dict[str, Callable[[], bytes]] = {
    # shared, doubled, recursive
    "tuples shared 60 deep": lambda: saved(whole(proving_state(2), extra_state=doubled(lambda a, b: (a, b)))),
    "tuples shared 60 deep, in the configuration": lambda: with_config(cfg={"model": doubled(lambda a, b: (a, b))}),
    "lists shared 60 deep, in the configuration": lambda: with_config(
        cfg={"model": {"a": doubled(lambda a, b: [a, b])}}
    ),
    "dicts shared 60 deep, in args": lambda: with_config(args=Namespace(a=doubled(lambda a, b: {"a": a, "b": b}))),
    "shared Namespaces": lambda: with_config(args=doubled(lambda a, b: Namespace(a=a, b=b))),
    "a configuration that holds itself": lambda: with_config(cfg=recursive()),
    "a shared tuple as a key": lambda: made_of(b"}", doubled_tuples(60), b"Ns"),
    "a set of a shared tuple": lambda: made_of(named("__builtin__", "set"), b"]", doubled_tuples(60), b"a\x85R"),
    "a deep tuple as a key": lambda: made_of(b"}", b")" + b"\x85" * 90_000, b"Ns"),
    "str of a shared list": lambda: made_of(named("__builtin__", "str"), doubled_lists(60), b"\x85R"),
    "a call of a shared list": lambda: made_of(doubled_lists(60), b")R"),
    "an enum of a shared list": lambda: made_of(
        named("fairseq.data.multilingual.multilingual_utils", "EncoderLangtok"), doubled_lists(60), b"\x85R"
    ),
    # more in memory than in the file
    "four million lists": lambda: made_of(b"]", b"]a" * 4_000_000),
    "a million sets": lambda: made_of(b"]", (b"\x8fa") * 1_000_000),
    "a list of a number's length": lambda: made_of(
        named("__builtin__", "list"), named("__builtin__", "bytearray"), b"J\x00\x00\x00\x40\x85R\x85R"
    ),
    "bytes of a number's length": lambda: made_of(named("__builtin__", "bytes"), b"J\x00\x00\x00\x40\x85R"),
    "bytes that double": lambda: made_of(
        named("_codecs", "encode"),
        b"q\x00",
        text("a"),
        text("hex"),
        b"\x86R",
        b"q\x01",
        *(b"h\x00h\x01" + text("hex") + b"\x86Rq\x01" for _ in range(40)),
    ),
    "a million tensors": lambda: with_pickle(
        b"\x80\x02}X\x05\x00\x00\x00model}("
        + b"".join(text(f"{n}") + named("torch._utils", "_rebuild_tensor_v2") + b")R" for n in range(60_000))
        + b"us."
    ),
    "a list of records longer than the file's": many_entries,
    "a deflated record of 1 GiB": lambda: archive(method=zipfile.ZIP_DEFLATED, **{"data/99": bytes(1 << 30)}),
    "a deflated pickle": lambda: archive(
        lambda name, data: data + bytes(200 << 20) if "pkl" in name else data, method=zipfile.ZIP_DEFLATED
    ),
    "records of 1 GB in a small file": lambda: unsized(saved(whole(proving_state(2)))),
    "bytes before the archive": lambda: b"PK\x03\x04" + bytes(100) + archive(),
    "an archive with a comment": lambda: archive()[:-2] + b"\x04\x00abcd",
    "an archive with a second description, in other letters": two_descriptions,
    "a second end of the archive": two_ends,
    "an archive's end that points elsewhere": lambda: moved_list(saved(whole(proving_state(2)))),
    # more time than memory
    "five million protocols": lambda: with_pickle(b"\x80\x03" * 5_000_000 + b"}."),
    "a bare pickle of protocols": lambda: b"\x80\x03" * 5_000_000 + b"}.",
    "a million names": lambda: made_of(b"](", named("numpy", "dtype") * 1_000_000, b"e"),
    "a million states of one object": lambda: made_of(named("argparse", "Namespace"), b")\x81", b"Nb" * 700_000),
    "three million values of one place": lambda: made_of(b"]q\x00(", b"h\x00" * 3_000_000, b"e"),
    "numbers of one hash as keys": lambda: made_of(b"}(", *(each + b"N" for each in numbers_of_one_hash(20_000)), b"u"),
    "numbers of one hash in a set": lambda: made_of(
        named("__builtin__", "set"), b"](", *numbers_of_one_hash(50_000), b"e\x85R"
    ),
    "numbers of one hash to count": lambda: made_of(
        named("collections", "Counter"), b"}(", *(each + b"N" for each in numbers_of_one_hash(20_000)), b"u\x85R"
    ),
    "a set of many tuples": lambda: made_of(
        named("__builtin__", "set"), b"(", *(b"M" + struct.pack("<H", n) + b"\x85" for n in range(40_000)), b"t\x85R"
    ),
    "a long tuple as a key 20,000 times": lambda: made_of(b"](", b"N" * 40_000, b"tq\x01a}(", b"h\x01N" * 20_000, b"u"),
    # tensors
    "a tensor of huge strides": lambda: with_model(**{KEY: Placed(0, (5, 3), (1 << 60, 1))}),
    "a tensor that begins behind its bytes": lambda: with_model(**{KEY: Placed(1 << 62, (5, 3), (3, 1))}),
    "a tensor larger than its bytes": lambda: with_model(**{KEY: Placed(0, (50, 3), (3, 1))}),
    "a tensor of 5000 dims": lambda: with_model(**{KEY: torch.ones((1,) * 5000)}),
    "old, a tensor of 5000 dims": lambda: saved(
        whole({KEY: torch.ones((1,) * 5000)}), _use_new_zipfile_serialization=False
    ),
    "a name of 100,000 letters": lambda: with_model(**{"x" * 100_000: torch.ones(3)}),
    "a tensor that repeats one value": lambda: with_model(**{KEY: torch.ones(1).expand(10**6, 10**6)}),
    "a state that shares one record a thousand times": lambda: with_model(
        **dict.fromkeys(map(str, range(3000)), torch.ones(10**5))
    ),
    "a sparse tensor": lambda: with_model(**{KEY: torch.sparse_coo_tensor([[0], [0]], [1.0], (10**6, 10**6))}),
    "a quantised tensor": lambda: with_model(**{KEY: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)}),
    "a meta tensor": lambda: with_model(**{KEY: torch.ones(10**6, 10**6, device="meta")}),
    "storage beyond the record": lambda: archive(lambda name, data: data[:8] if name.endswith("data/1") else data),
    "a number in the place of a tensor": lambda: with_model(**{KEY: 3}),
    "an array in the place of a tensor": lambda: with_model(**{KEY: np.float64(1)}),
    # the configuration
    "a number of a million digits": lambda: with_config(cfg={"model": {"_name": "transformer_lm", "x": 1 << 2000}}),
    "no model in the configuration": lambda: with_config(cfg={"model": None}),
    "a list in the place of the configuration": lambda: with_config(cfg=[1, 2]),
    "a text in the place of args": lambda: with_config(args="x" * 10**6, cfg=None),
    "a name of a million letters": lambda: with_config(cfg={"model": {"_name": "x" * 10**6}}),
    "10^7 layers": lambda: with_config(cfg={"model": {"_name": "transformer_lm", "decoder_layers": 10**7}}),
    "doubled interpolations": lambda: with_config(
        cfg={
            "model": OmegaConf.create(
                {f"a{n}": f"${{a{n + 1}}}" * 2 for n in range(60)} | {"a60": "x", "_name": "${a0}"}
            )
        }
    ),
    # before PyTorch 1.6
    "old, tuples shared 60 deep": lambda: saved(
        whole(proving_state(2), extra_state=doubled(lambda a, b: (a, b))), _use_new_zipfile_serialization=False
    ),
    "old, a tensor that repeats one value": lambda: saved(
        whole({KEY: torch.ones(1).expand(10**6, 10**6)}), _use_new_zipfile_serialization=False
    ),
    "old, a sparse tensor": lambda: saved(
        whole({KEY: torch.sparse_coo_tensor([[0], [0]], [1.0], (9, 9))}), _use_new_zipfile_serialization=False
    ),
    "a bare pickle of lists": lambda: b"\x80\x02]" + b"]a" * 4_000_000 + b".",
}


@pytest.fixture(scope="module", autouse=True)
def hooks():
    fairseq_hooks.install()
    saved_once = io.BytesIO()
    torch.save(whole(proving_state(2)), saved_once)  # imports what the children will need


def served(path: Path) -> None:
    fairseq_hooks.checkpoint_utils.load_checkpoint_to_cpu(fairseq_hooks.ServedPath(path))


@pytest.mark.parametrize("name", FILES)
def test_a_broken_file_ends_in_one_sentence(tmp_path, name):
    path = tmp_path / "X.pt"
    path.write_bytes(FILES[name]())
    refused_cheaply(lambda: served(path), path.stat().st_size, "X.pt")


def test_a_rank_file_of_any_number(tmp_path):
    for name in ("X-shared.pt", "X-rank-0.pt", f"X-rank-{10**12}.pt"):
        (tmp_path / name).write_bytes(saved(whole(proving_state(2))))
    refused_cheaply(lambda: served(tmp_path / "X.pt"), 0, f"from 0 to {10**12}", "missing X-rank-1.pt")


@pytest.mark.parametrize("place", ["X-shared.pt", "X-rank-0.pt"])
def test_a_rank_file_that_is_a_fifo(tmp_path, place):
    for name in ("X-shared.pt", "X-rank-0.pt"):
        (tmp_path / name).write_bytes(saved(whole(proving_state(2))))
    (tmp_path / place).unlink()
    os.mkfifo(tmp_path / place)
    refused_cheaply(lambda: served(tmp_path / "X.pt"), 0, place)


@pytest.mark.parametrize(
    "fields",
    [{"encoder_layers": 10**9}, {"encoder_layers": "x"}, {3: 4}, {"decoder_embed_path": "/etc/passwd"}, {"keys": 1}],
    ids=str,
)
def test_an_export_of_a_configuration_that_claims_more(tmp_path, fields):
    args = Namespace()
    vars(args).update({"arch": "transformer", **fields})
    model = {"encoder.embed_tokens.weight": torch.ones(9, 4), **proving_state(2)}
    (tmp_path / "X.pt").write_bytes(saved(whole(model, args=args, cfg=None)))
    refused_cheaply(lambda: export_hf(str(tmp_path / "X.pt"), str(tmp_path / "hf")), 0, "X.pt")


@pytest.mark.parametrize("value", [3.5j, [1], {"a": {"b": {"c": ["d"]}}}, {1: "a"}, [["en"]], b"en"], ids=str)
@pytest.mark.parametrize("name", ["langs", "lang_pairs", "langtoks", "finetune_dict_specs", "source_lang"])
def test_options_of_the_checkpoints_task_are_words(tmp_path, name, value):
    cfg = {"model": {"_name": "transformer_lm", "decoder_layers": 0}, "task": {"_name": "x", name: value}}
    (tmp_path / "X.pt").write_bytes(with_config(cfg=cfg))
    refused_cheaply(lambda: served(tmp_path / "X.pt"), 0, "X.pt", name)


def test_pickles_opcodes_are_as_the_tests_write_them():
    assert pickle.loads(b"\x80\x02" + doubled_tuples(2) + b".") == (((), ()), ((), ()))
    assert pickle.loads(b"\x80\x02" + doubled_lists(2) + b".") == [[[], []], [[], []]]


def test_a_record_that_a_header_puts_into_another_one(tmp_path):
    """Both are as long, and the checksum is right: it would be the other one's values."""
    file = tmp_path / "X.pt"
    torch.save({"model": {"a": torch.zeros(20), "b": torch.ones(20)}}, file)
    data = bytearray(file.read_bytes())
    with zipfile.ZipFile(file) as archive:
        first, second = (archive.getinfo(f"X/data/{number}").header_offset for number in range(2))
    lengths = [sum(struct.unpack_from("<HH", data, header + 26)) for header in (first, second)]
    (extra,) = struct.unpack_from("<H", data, first + 28)
    struct.pack_into("<H", data, first + 28, extra + second + lengths[1] - first - lengths[0])
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="record X/data/0 must end before the next one"):
        read_checkpoint(str(file))
