"""A quantised checkpoint's file: what is written is read, and what is no such file is refused in one sentence."""

import json

import pytest
import torch
from quantized_files import STATE, about, write_quantized

from fairseq_moe_ext.checkpoints.checkpoint_summary import place_of
from fairseq_moe_ext.checkpoints.errors import CheckpointError
from fairseq_moe_ext.checkpoints.quantized_file import QuantizedFile
from fairseq_moe_ext.safetensors_header import ALIGNMENT

EXPERT = "decoder.layers.1.moe_layer.experts.3.int4"
TENSORS = {
    "decoder.layer_norm.weight": torch.linspace(-1, 1, 5),
    "half": torch.arange(6, dtype=torch.float16).view(2, 3),
    EXPERT: torch.arange(192, dtype=torch.uint8),
    "decoder.embed_tokens.weight.int8": torch.arange(64, dtype=torch.uint8),
    "empty": torch.empty(0),
}
FILES = {"dict.txt": b"a 1\nb 1\n", "sentencepiece.bpe.model": b"\x00\xff\x01"}
ALIAS = {"decoder.output_projection.weight.int8": "decoder.embed_tokens.weight.int8"}


@pytest.fixture
def path(tmp_path):
    written = tmp_path / "X.safetensors"
    write_quantized(written, TENSORS, FILES, aliases=ALIAS)
    return written


def header_of(content: bytes) -> tuple[dict, int]:
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), 8 + length


def with_header(content: bytes, change) -> bytes:
    """The file with `change` made in its header."""
    header, start = header_of(content)
    change(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[start:]


def with_about(content: bytes, **fields) -> bytes:
    def change(header):
        said = json.loads(header["__metadata__"]["fairseq_moe_ext"])
        header["__metadata__"]["fairseq_moe_ext"] = json.dumps({**said, **fields})

    return with_header(content, change)


class TestARoundTrip:
    def test_gives_the_tensors_the_files_and_what_was_said(self, path):
        file = QuantizedFile(path)
        tensors = file.tensors()
        assert file.about == about(aliases=ALIAS) and file.about.state == STATE and file.files() == FILES
        assert set(tensors) == {*TENSORS, *ALIAS}
        for name, wanted in TENSORS.items():
            assert tensors[name].dtype == wanted.dtype and torch.equal(tensors[name].read(), wanted)

    def test_an_alias_is_the_same_tensor_in_the_same_place(self, path):
        tensors = QuantizedFile(path).tensors()
        (alias, name), *_ = ALIAS.items()
        assert place_of(tensors[alias]) == place_of(tensors[name]) != place_of(tensors[EXPERT])

    def test_reads_straight_into_a_parameter_and_counts_the_bytes(self, path):
        file = QuantizedFile(path)
        slot = torch.zeros(192, dtype=torch.uint8)
        slot.copy_(file.tensors()[EXPERT])
        assert torch.equal(slot, TENSORS[EXPERT]) and file.loading.bytes == 192

    def test_blocks_come_first_and_are_aligned_and_the_rest_by_its_values_size(self, path):
        header, start = header_of(path.read_bytes())
        header.pop("__metadata__")
        places = {name: start + entry["data_offsets"][0] for name, entry in header.items()}
        assert all(places[name] % ALIGNMENT == 0 for name, tensor in TENSORS.items() if tensor.dtype == torch.uint8)
        assert all(places[name] % tensor.element_size() == 0 for name, tensor in TENSORS.items())
        blocks = places[EXPERT], places["decoder.embed_tokens.weight.int8"]
        assert max(blocks) < places["decoder.layer_norm.weight"] < places["half"] < places["file/dict.txt"]

    def test_is_a_file_that_the_safetensors_library_reads(self, path):
        library = pytest.importorskip("safetensors.torch")
        tensors = library.load_file(path)
        assert all(torch.equal(tensors[name], wanted) for name, wanted in TENSORS.items())


class TestWhatIsNoSuchFileIsRefused:
    def refuse(self, path, content: bytes, words: str):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=words) as caught:
            QuantizedFile(path)
        assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)

    def test_that_is_not_there(self, tmp_path):
        with pytest.raises(CheckpointError, match=r"Y\.safetensors: no such file$"):
            QuantizedFile(tmp_path / "Y.safetensors")

    @pytest.mark.parametrize("left", [0, 4, 100, -1])
    def test_that_is_cut_off(self, path, left):
        content = path.read_bytes()
        self.refuse(path, content[: len(content) + left if left < 0 else left], "truncated or damaged: ")

    def test_that_is_longer_than_it_says(self, path):
        self.refuse(path, path.read_bytes() + b"\0", "it must have .* bytes, found")

    def test_that_has_a_hole(self, path):
        def change(header):
            header[EXPERT]["shape"] = [128]
            header[EXPERT]["data_offsets"][1] -= 64

        self.refuse(path, with_header(path.read_bytes(), change), "must begin where the one before it ends")

    def test_that_is_of_another_version(self, path):
        self.refuse(path, with_about(path.read_bytes(), version=2), "must be of format version 1, got 2")

    def test_that_is_another_safetensors_file(self, path):
        content = with_header(path.read_bytes(), lambda header: header.pop("__metadata__"))
        self.refuse(path, content, "not a quantised checkpoint: its metadata must have fairseq_moe_ext")

    def test_that_is_half_written(self, tmp_path):
        from fairseq_moe_ext.checkpoints.quantized_writer import QuantizedWriter

        QuantizedWriter(tmp_path / "X.safetensors", [("a", torch.float32, (2,))], {}, about(), "0")
        with pytest.raises(CheckpointError, match=r"X\.safetensors: no such file"):
            QuantizedFile(tmp_path / "X.safetensors")

    @pytest.mark.parametrize(
        "fields, words",
        [
            ({"group": 32}, "group of a quantised checkpoint must be 64, got 32"),
            ({"experts": "int3"}, "experts of a quantised checkpoint must be one of int8, int4, got 'int3'"),
            ({"dense": None}, "dense of a quantised checkpoint must be one of"),
            ({"source": {"fingerprint": "", "files": [["x"]], "licence": None}}, "source of a quantised checkpoint"),
            ({"state": {"args": 1}}, "state of a quantised checkpoint must be a checkpoint's state"),
            ({"aliases": {"x": "nowhere"}}, "aliases must be further names of its tensors, got x for nowhere"),
            ({"aliases": {EXPERT: "half"}}, "aliases must be further names"),
            ({"dims": {"x": [3]}}, "dims of a quantised checkpoint must be an object of two sizes each"),
            ({"dims": {"x": [3, 0]}}, "dims of a quantised checkpoint must be"),
            ({"more": 1}, "wrong or missing: more"),
        ],
    )
    def test_that_says_something_else(self, path, fields, words):
        self.refuse(path, with_about(path.read_bytes(), **fields), words)

    @pytest.mark.parametrize("checksums", [None, "", "00000000 1", 7])
    def test_that_has_no_checksum_of_each_tensor(self, path, checksums):
        def change(header):
            header["__metadata__"]["crc32"] = checksums

        self.refuse(path, with_header(path.read_bytes(), change), "crc32 of its metadata must be 8 hex digits for each")


class TestADamagedTensor:
    def damage(self, path, name: str):
        content = bytearray(path.read_bytes())
        header, start = header_of(bytes(content))
        content[start + header[name]["data_offsets"][0]] ^= 1
        path.write_bytes(content)

    def test_of_an_expert_is_named_when_it_is_read(self, path):
        self.damage(path, EXPERT)
        file = QuantizedFile(path)
        with pytest.raises(CheckpointError, match=rf"X\.safetensors: record {EXPERT} is damaged: its checksum must be"):
            torch.empty(192, dtype=torch.uint8).copy_(file.tensors()[EXPERT])
        assert torch.equal(file.tensors()["half"].read(), TENSORS["half"])

    def test_of_a_text_file_is_named(self, path):
        self.damage(path, "file/dict.txt")
        with pytest.raises(CheckpointError, match=r"record file/dict\.txt is damaged"):
            QuantizedFile(path).files()
