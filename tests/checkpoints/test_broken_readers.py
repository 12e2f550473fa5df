"""Files that are no checkpoints, of any content: each ends in one sentence that names the file, and takes little."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from measured import refused_cheaply

from fairseq_moe_ext.balancing.placement import load_placement
from fairseq_moe_ext.checkpoints.dictionary_file import load_dictionary
from fairseq_moe_ext.checkpoints.safetensors_file import read_safetensors
from fairseq_moe_ext.nllb.hf_folder import read_json
from fairseq_moe_ext.trace import load_trace

READERS = (load_placement, load_dictionary, read_json, read_safetensors, load_trace)


def safetensors(header, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def tensor(first, last, shape=(2,), dtype="F32") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [first, last]}


SAFETENSORS: dict[str, bytes] = {
    "overlapping": safetensors({"a": tensor(0, 8), "b": tensor(4, 12)}, bytes(12)),
    "twice the same bytes": safetensors({"a": tensor(0, 8), "b": tensor(0, 8)}, bytes(8)),
    "a hole": safetensors({"a": tensor(0, 8), "b": tensor(12, 20)}, bytes(20)),
    "a hole before the first": safetensors({"a": tensor(4, 12)}, bytes(12)),
    "fractions": safetensors({"a": tensor(0.0, 8.0)}, bytes(8)),
    "half bytes": safetensors({"a": tensor(0.5, 8.5)}, bytes(9)),
    "texts for offsets": safetensors({"a": tensor("0", "8")}, bytes(8)),
    "flags for offsets": safetensors({"a": tensor(False, True, (1,), "F32")}, bytes(4)),
    "a fractional size": safetensors({"a": tensor(0, 8, (2.0,))}, bytes(8)),
    "a text for a size": safetensors({"a": tensor(0, 8, ("2",))}, bytes(8)),
    "a flag for a size": safetensors({"a": tensor(0, 4, (True,))}, bytes(4)),
    "a negative size": safetensors({"a": tensor(0, 8, (-2, -1))}, bytes(8)),
    "negative offsets": safetensors({"a": tensor(-8, 0)}, bytes(8)),
    "offsets in reverse": safetensors({"a": tensor(8, 0)}, bytes(8)),
    "three offsets": safetensors({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 8]}}, bytes(8)),
    "huge sizes": safetensors({"a": tensor(0, 8, (1 << 40, 1 << 40, 0, 2))}, bytes(8)),
    "sizes of a thousand digits": safetensors(
        b'{"a":{"dtype":"F32","shape":[%b],"data_offsets":[0,8]}}' % (b"9" * 999)
    ),
    "a million sizes": safetensors({"a": tensor(0, 4, (1,) * 1_000_000)}, bytes(4)),
    "a name twice": safetensors(b'{"a":%b,"a":%b}' % ((json.dumps(tensor(0, 8)).encode(),) * 2), bytes(8)),
    "more bytes than said": safetensors({"a": tensor(0, 8)}, bytes(9)),
    "fewer bytes than said": safetensors({"a": tensor(0, 8)}, bytes(7)),
    "a header longer than the file": safetensors({"a": tensor(0, 8)}, bytes(8), length=1000),
    "a header of 2^63 bytes": safetensors({}, length=1 << 63),
    "a list": safetensors([1]),
    "null": safetensors(b"null"),
    "a tensor of null": safetensors({"a": None}),
    "an unknown type": safetensors({"a": tensor(0, 8, dtype=["F32"])}, bytes(8)),
    "integers": safetensors({"a": tensor(0, 8, dtype="I32")}, bytes(8)),
    "not UTF-8": safetensors(b'{"\xff":1}'),
    "nested": safetensors(b"[" * 200_000),
    "three million lists": safetensors(b"[" + b"[]," * 3_000_000 + b"[]]"),
    "shorter than a length": b"1234",
}


def npz(method=zipfile.ZIP_DEFLATED, **arrays) -> bytes:
    """A trace's archive; an array, or the member's bytes as they are."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method, compresslevel=1) as archive:
        for name, array in arrays.items():
            if not isinstance(array, bytes):
                member = io.BytesIO()
                np.save(member, array)
                array = member.getvalue()
            archive.writestr(f"{name}.npy", array)
    return buffer.getvalue()


def header_of(shape: tuple, descr: str = "|u1", data: bytes = b"") -> bytes:
    member = io.BytesIO()
    np.lib.format.write_array_header_1_0(member, {"descr": descr, "fortran_order": False, "shape": shape})
    return member.getvalue() + data


NAMES, LOAD, BATCH = np.array(["decoder.layers.1.moe_layer"]), np.ones((2, 1, 4), np.uint8), np.arange(2)


def trace(**changed) -> bytes:
    return npz(**{"decode_names": NAMES, "decode_load": LOAD, "decode_batch": BATCH, **changed})


def doubled_member(archive: bytes) -> bytes:
    """With another array of a name that stands there already."""
    buffer = io.BytesIO(archive)
    with zipfile.ZipFile(buffer, "a") as written, pytest.warns(UserWarning, match="Duplicate name"):
        written.writestr("decode_load.npy", written.read("decode_load.npy"))
    return buffer.getvalue()


TRACES: dict[str, Callable[[], bytes]] = {
    "1 GiB of zeros": lambda: trace(decode_load=header_of((1 << 30, 1, 1), data=bytes(1 << 30))),
    "200 MB of zeros": lambda: trace(decode_load=header_of((200_000_000, 1, 1), data=bytes(200_000_000))),
    "a shape that the bytes do not fill": lambda: trace(decode_load=header_of((1 << 40, 1, 4))),
    "a negative shape": lambda: trace(decode_load=header_of((-2, 1, -4), data=bytes(8))),
    "a name of 2 GB": lambda: trace(decode_names=header_of((1,), descr="<U500000000")),
    "objects": lambda: trace(decode_names=header_of((1,), descr="|O", data=bytes(8))),
    "floats": lambda: trace(decode_load=np.full((2, 1, 4), np.nan)),
    "times": lambda: trace(decode_batch=np.zeros(2, "M8[s]")),
    "fractional batches": lambda: trace(decode_batch=np.zeros(2)),
    "signed loads": lambda: trace(decode_load=LOAD.astype(np.int64)),
    "a single name": lambda: trace(decode_names=np.array("decoder")),
    "numbers for names": lambda: trace(decode_names=np.array([1])),
    "other numbers of layers": lambda: trace(decode_names=np.array(["a", "b"])),
    "no names": lambda: npz(decode_load=LOAD, decode_batch=BATCH),
    "no phases": lambda: npz(x=LOAD),
    "no arrays": lambda: npz(),
    "text for an array": lambda: trace(decode_load=b"text"),
    "half an array": lambda: trace(decode_load=header_of((2, 1, 4), data=bytes(7))),
    "a header of code": lambda: trace(decode_load=b"\x93NUMPY\x01\x00\x20\x00" + b"__import__('os').system('true')"),
    "cut off": lambda: trace()[:-30],
    "an array twice": lambda: doubled_member(trace()),
    "loads beyond any count": lambda: trace(decode_load=np.full((2, 1, 4), 1 << 40, np.uint64)),
    "batches beyond any number": lambda: trace(decode_batch=np.full(2, (1 << 64) - 1, np.uint64)),
    "no steps": lambda: trace(decode_load=LOAD[:0], decode_batch=BATCH[:0]),
    "forty million experts": lambda: trace(decode_load=np.ones((1, 1, 40_000_000), np.uint8), decode_batch=BATCH[:1]),
    "twenty thousand layers": lambda: trace(
        decode_names=np.arange(20_000).astype(str), decode_load=np.ones((2, 20_000, 1), np.uint8)
    ),
    "a long name": lambda: trace(decode_names=np.array(["x" * 100_000])),
    "a name of half a letter": lambda: trace(decode_names=header_of((1,), "<U1", b"\x00\xd8\x00\x00")),
    "a name of two lines": lambda: trace(decode_names=np.array(["a\nb"])),
    "20,000 arrays": lambda: npz(zipfile.ZIP_STORED, **{str(number): b"" for number in range(20_000)}),
}

JSON: dict[str, bytes] = {
    "nested": b"[" * 300_000,
    "nested objects": b'{"a":' * 300_000,
    "four million lists": b"[" + b"[]," * 4_000_000 + b"[]]",
    "a number of a million digits": b'{"world_size": %b}' % (b"9" * 1_000_000),
    "not UTF-8": b'{"a": "\xff"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "a list": b"[1]",
    "a number": b"NaN",
    "cut off": b'{"a": ',
    "a name twice": b'{"a": 1, "b": [{"c": 1, "c": 2}]}',
    "not a number": b'{"a": NaN}',
    "infinity": b'{"a": [-Infinity]}',
    "a number of a thousand digits": b'{"a": %b}' % (b"9" * 1000),
    "nested 500 deep": b'{"a": ' + b"[" * 500 + b"]" * 500 + b"}",
    "two objects": b"{}{}",
}

PLACEMENTS: dict[str, bytes] = {
    **JSON,
    "no layers": b'{"world_size": 2, "layers": {}}',
    "layers in a list": b'{"world_size": 2, "layers": [[0]]}',
    "a fractional world size": b'{"world_size": 2.0, "layers": {"a": [[0]]}}',
    "a world size of true": b'{"world_size": true, "layers": {"a": [[0]]}}',
    "a world size of NaN": b'{"world_size": NaN, "layers": {"a": [[0]]}}',
    "a huge world size": b'{"world_size": %b, "layers": {"a": [[0]]}}' % (b"9" * 4000),
    "a rank of null": b'{"world_size": 2, "layers": {"a": [[null]]}}',
    "a rank of 1e400": b'{"world_size": 2, "layers": {"a": [[1e400]]}}',
    "a huge rank": b'{"world_size": 2, "layers": {"a": [[%b]]}}' % (b"9" * 4000),
    "no list of experts": b'{"world_size": 2, "layers": {"a": 3}}',
    "no list of ranks": b'{"world_size": 2, "layers": {"a": [3]}}',
    "a long text for ranks": json.dumps({"world_size": 2, "layers": {"a": ["x" * 10**6]}}).encode(),
    "a long list of texts for ranks": json.dumps({"world_size": 2, "layers": {"a": [["x"] * 10**5]}}).encode(),
    "a long name": json.dumps({"world_size": 2, "layers": {"x" * 10**6: [[]]}}).encode(),
}

DICTIONARIES: dict[str, bytes] = {
    "not UTF-8": b"a 1\n\xff 1\n",
    "no count": b"word\n",
    "a count in words": b"word many\n",
    "a fractional count": b"word 1.5\n",
    "a count of 5000 digits": b"word " + b"9" * 5000 + b"\n",
    "a word twice": b"a 1\na 1\n",
    "four million lines": b"\n" * 4_000_000,
    "a line of 3 MB": b"x" * 3_000_000,
    "zeros": bytes(1000),
}

CASES = [
    *((read_safetensors, name, lambda content=content: content) for name, content in SAFETENSORS.items()),
    *((load_trace, name, make) for name, make in TRACES.items()),
    *((read_json, name, lambda content=content: content) for name, content in JSON.items()),
    *((load_placement, name, lambda content=content: content) for name, content in PLACEMENTS.items()),
    *((load_dictionary, name, lambda content=content: content) for name, content in DICTIONARIES.items()),
]


@pytest.mark.parametrize(
    ("read", "make"),
    [(read, make) for read, _, make in CASES],
    ids=[f"{read.__name__}, {name}" for read, name, _ in CASES],
)
def test_a_broken_file_ends_in_one_sentence(tmp_path, read, make):
    path = tmp_path / "file.safetensors"
    path.write_bytes(make())
    refused_cheaply(lambda: read(path), path.stat().st_size, str(path))


@pytest.mark.parametrize("read", READERS, ids=lambda read: read.__name__)
@pytest.mark.parametrize("what", ["nothing", "a folder", "a FIFO", "a device", "a link to nothing", "an empty file"])
def test_what_is_no_file(tmp_path, read, what):
    path = tmp_path / "file"
    if what == "a folder":
        path.mkdir()
    elif what == "a FIFO":
        os.mkfifo(path)
    elif what == "a device":
        path = Path("/dev/zero")
    elif what == "a link to nothing":
        path.symlink_to(tmp_path / "other")
    elif what == "an empty file":
        path.touch()
        if read is load_dictionary:
            assert len(read(path)) == 4  # a dictionary of the specials alone
            return
    refused_cheaply(lambda: read(path), 0, str(path))


def test_whole_files_are_read(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(safetensors({"b": tensor(8, 16), "a": tensor(0, 8), "c": tensor(8, 8, (0, 3))}, bytes(16)))
    assert torch.equal(read_safetensors(path).tensors["b"].read(), torch.zeros(2))
    path.write_bytes(trace())
    assert load_trace(path)["decode"].names == tuple(NAMES)
    path.write_bytes(
        trace(decode_load=np.zeros((4_000_000, 1, 4), np.uint8), decode_batch=np.zeros(4_000_000, np.int8))
    )
    assert load_trace(path)["decode"].load.shape == (4_000_000, 1, 4)
    path.write_bytes(b"a 1\r\nb 2\n")
    assert load_dictionary(path).symbols[4:] == ["a", "b"]
