"""`fairseq-moe quantize` of Hugging Face's layout: the same as of the converted checkpoint, shard by shard."""

import json
import shutil
from pathlib import Path

import hf_makers
import numpy as np
import pytest
import torch
from hf_makers import converted
from quantized_sources import assert_holds, quantize, wanted_tensors
from safetensors.torch import load_file, save_file

from fairseq_moe_ext.checkpoints.quantized_file import QuantizedFile
from fairseq_moe_ext.recording import Choices, Inputs, LayerRecord, Record, Sample, save_record

README = "---\nlanguage:\n- ace\nlicense: cc-by-nc-4.0\n---\n# NLLB\nlicense: none\n"
TIED = ("decoder.embed_tokens.weight", "decoder.output_projection.weight")
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of three shards, each expert's tensors in all of them; not to be changed."""
    folder = tmp_path_factory.mktemp("nllb") / "hf"
    hf_makers.write_model(folder)
    (folder / "README.md").write_text(README)
    return folder


@pytest.fixture(scope="module")
def whole(made, tmp_path_factory):
    """Its quantised file, written in one run."""
    target = tmp_path_factory.mktemp("whole") / "X.safetensors"
    assert quantize(made, target) == 0
    return target


@pytest.fixture
def copy(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "hf"))


@pytest.fixture
def target(tmp_path):
    return tmp_path / "X.safetensors"


def error_of(capsys) -> str:
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    return last


def wanted(ours: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of a converted checkpoint."""
    return wanted_tensors(ours, "int4", "int8")


class TestTensors:
    def test_are_what_quantising_the_converted_checkpoint_gives(self, made, whole, tmp_path):
        file = assert_holds(whole, wanted(converted(made, tmp_path / "x.pt")))
        assert file.about.aliases == {f"{key}.int8": "encoder.embed_tokens.weight.int8" for key in TIED}

    def test_of_a_bin_folder_and_of_one_file_are_the_same(self, whole, tmp_path, target):
        hf_makers.write_model(tmp_path / "hf", kind="bin", shards=1)
        assert quantize(tmp_path / "hf", target) == 0
        assert_holds(target, {name: tensor.read() for name, tensor in QuantizedFile(whole).tensors().items()})

    def test_rows_take_the_order_of_the_trainings_dictionary(self, made, tmp_path, target):
        file = hf_makers.write_dictionary(tmp_path / "dict.txt", hf_makers.pieces_of(made)[::-1])
        assert quantize(made, target, "--dictionary", str(file)) == 0
        ours = converted(made, tmp_path / "x.pt", str(file))
        assert_holds(target, wanted(ours))
        assert QuantizedFile(target).files()["dict.txt"] == (tmp_path / "x.dict.txt").read_bytes()

    def test_of_a_dense_model(self, tmp_path, target):
        hf_makers.write_model(tmp_path / "hf", hf_makers.DENSE)
        assert quantize(tmp_path / "hf", target) == 0
        assert_holds(target, wanted(converted(tmp_path / "hf", tmp_path / "x.pt")))


class TestWhatTheFileSays:
    def test_state_vocabulary_pieces_and_licence(self, made, whole, tmp_path):
        converted(made, tmp_path / "x.pt")
        file = QuantizedFile(whole)
        names = {"dict.txt": tmp_path / "x.dict.txt", "langs.txt": tmp_path / "x.langs.txt"}
        names["sentencepiece.bpe.model"] = made / "sentencepiece.bpe.model"
        assert file.files() == {name: path.read_bytes() for name, path in names.items()}
        assert file.about.source.licence == "cc-by-nc-4.0"
        assert file.about.state["args"]["langs"] == list(hf_makers.LANGUAGES)
        assert len(file.about.state["extra_state"]["dictionary_checksum"]) == 64
        shards = sorted(made.glob("*.safetensors"))
        assert file.about.source.files == tuple((shard.name, shard.stat().st_size) for shard in shards)

    @pytest.mark.parametrize("readme", [None, "license: mit\n", "---\nlanguage: de\n---\nlicense: mit\n", "---\n"])
    def test_no_licence_where_the_readmes_head_has_none(self, copy, target, readme):
        (copy / "README.md").unlink()
        if readme is not None:
            (copy / "README.md").write_text(readme)
        for shard in copy.glob("*.safetensors"):
            shard.unlink()
        from fairseq_moe_ext.nllb.hf_source import HfSource

        assert HfSource(str(copy)).model().licence is None


class TestShardByShard:
    @pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
    def test_each_may_come_alone_and_go(self, copy, whole, target, order, capsys):
        """The same file, byte by byte, as from the whole folder."""
        shards = sorted(copy.glob("*.safetensors"))
        kept = {shard: shard.read_bytes() for shard in shards}
        for shard in shards:
            shard.unlink()
        assert quantize(copy, target) == 1
        assert f"waits for {', '.join(shard.name for shard in shards)}: the rest" in error_of(capsys)
        for number in order:
            assert not target.exists()
            shards[number].write_bytes(kept[shards[number]])
            code = quantize(copy, target)
            shards[number].unlink()
        assert code == 0 and target.read_bytes() == whole.read_bytes()
        assert [file.name for file in target.parent.glob("X*")] == [target.name]

    def test_parts_without_an_index_are_waited_for_by_their_names(self, copy, whole, target, capsys):
        (copy / INDEX).unlink()
        first, *later = sorted(copy.glob("*.safetensors"))
        kept = first.read_bytes()
        first.unlink()
        assert quantize(copy, target) == 1 and f"waits for {first.name}" in error_of(capsys)
        first.write_bytes(kept)
        later[0].unlink()
        assert quantize(copy, target) == 0 and target.read_bytes() == whole.read_bytes()


class TestBadInput:
    def refuse(self, source, target, capsys, words):
        assert quantize(source, target) == 1
        assert words in error_of(capsys) and not target.exists()

    def test_a_truncated_shard(self, copy, target, capsys):
        shard = copy / "model-00002-of-00003.safetensors"
        shard.write_bytes(shard.read_bytes()[:-1])
        self.refuse(copy, target, capsys, f"{shard}: truncated or damaged: it must have ")

    def test_a_shard_that_lacks_a_tensor(self, copy, target, capsys):
        shard = copy / "model-00002-of-00003.safetensors"
        tensors = load_file(shard)
        (name, _), *_ = tensors.items()
        save_file({key: tensor for key, tensor in tensors.items() if key != name}, shard)
        self.refuse(copy, target, capsys, f"{shard}: the index says that it holds {name}")

    def test_a_value_that_is_no_number(self, copy, target, capsys):
        shard = copy / "model-00001-of-00003.safetensors"
        tensors = load_file(shard)
        tensors["model.shared.weight"][3, 3] = float("nan")
        save_file(tensors, shard)
        self.refuse(copy, target, capsys, f"{shard}: model.shared.weight: weights must be finite numbers")

    def test_a_configuration_that_changed(self, copy, target, capsys):
        (copy / "model-00002-of-00003.safetensors").unlink()
        assert quantize(copy, target) == 1
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps({**config, "moe_token_dropout": 0.5}))
        self.refuse(copy, target, capsys, "what an earlier run has begun is of another source or of other options")

    def test_an_index_that_lacks_a_tensor(self, copy, target, capsys):
        index = json.loads((copy / INDEX).read_text())
        del index["weight_map"]["model.shared.weight"]
        (copy / INDEX).write_text(json.dumps(index))
        self.refuse(copy, target, capsys, "1 tensors are missing, the first is model.shared.weight")

    def test_a_model_that_another_library_has_quantised(self, copy, target, capsys):
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps({**config, "quantization_config": {"bits": 4}}))
        self.refuse(copy, target, capsys, "it is quantised already: config.json has a quantization_config")

    def test_data_beside_a_folder_that_has_its_own(self, copy, target):
        with pytest.raises(SystemExit):
            quantize(copy, target, "--data", str(copy))


def test_a_calibrated_run_that_was_killed_between_a_block_and_the_journal_is_not_gone_on_with(tmp_path, capsys):
    """The experts' tensors lie in three files; of a bias and its correction one is lost in their sum."""
    folder, target = tmp_path / "hf", tmp_path / "X.safetensors"
    hf_makers.write_model(folder)
    experts, model_dim = hf_makers.TINY["num_experts"], hf_makers.TINY["d_model"]
    layers = {}
    for name in (f"{side}.layers.{number}.moe_layer" for side in ("encoder", "decoder") for number in (1, 3)):
        numbers = np.random.default_rng(len(layers))
        dims = model_dim, hf_makers.TINY["encoder_ffn_dim"]
        means = [numbers.normal(size=(experts, dim)).astype(np.float32) for dim in dims]
        inputs = (Inputs(np.full(experts, 500), mean, mean**2 + 1) for mean in means)
        nothing = np.zeros((1, experts), np.int64)
        sample = Sample(np.zeros(0, np.uint64), np.zeros((0, model_dim), np.float16), np.zeros((0, 2), np.int32),
                        np.zeros(0, np.int32))  # fmt: skip
        layers[name] = LayerRecord(*inputs, Choices(nothing, nothing.astype(float), nothing), sample)
    save_record(tmp_path / "record.npz", Record(("",), layers))
    arguments = (folder, target, "--calibrate", str(tmp_path / "record.npz"))
    second, third = sorted(folder.glob("*.safetensors"))[1:]
    away = {file: file.read_bytes() for file in (second, third)}
    for file in away:
        file.unlink()
    quantize(*arguments)
    journal = tmp_path / "X.safetensors.partial.json"
    before = journal.read_text()
    second.write_bytes(away[second])
    quantize(*arguments)
    third.write_bytes(away[third])
    after = journal.read_text()
    assert json.loads(before)["begun"] and before != after
    journal.write_text(before)  # as if the second run had been killed before it wrote it
    capsys.readouterr()
    assert quantize(*arguments) != 0
    assert "an earlier run was broken off while it wrote" in capsys.readouterr().err.splitlines()[-1]
    assert not target.exists()
    journal.write_text(after)
    assert quantize(*arguments) == 0
    hf_makers.write_model(tmp_path / "one", shards=1)
    assert quantize(tmp_path / "one", tmp_path / "one.safetensors", *arguments[2:]) == 0
    spread, at_once = (QuantizedFile(file).tensors() for file in (target, tmp_path / "one.safetensors"))
    assert all(torch.equal(spread[key], at_once[key]) for key in at_once)
