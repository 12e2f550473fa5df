"""`fairseq-moe quantize` of fairseq's layouts: each tensor as the quantiser makes it, file by file, or one sentence."""

import os
import re
import shutil

import pytest
import torch
from checkpoint_makers import split, whole
from full_disk import full_at
from quantized_sources import PARTS, assert_holds, quantize, random_state, wanted_tensors

from fairseq_moe_ext.checkpoints.quantized_file import QuantizedFile
from fairseq_moe_ext.kernels.block import LinearBlock

MODEL = random_state()
EXPERT = "decoder.layers.1.moe_layer.experts.3"


def told(rank: int | None = None, updates: int = 7):
    """What `split` writes beside the tensors, as rank `rank` after so many updates."""

    def template(model):
        cfg = {"model": {"_name": "transformer_lm"}, "task": {"langs": ["en", "de"]}}
        if rank is not None:
            cfg["distributed_training"] = {"distributed_rank": rank}
        return whole(model, cfg=cfg, optimizer_history=[{"num_updates": updates}])

    return template


@pytest.fixture
def parts(tmp_path):
    """X-shared.pt with two rank files."""
    return [tmp_path / "X-shared.pt", *split(MODEL, 2, tmp_path, template=told())]


@pytest.fixture
def target(tmp_path):
    return tmp_path / "out" / "X.safetensors"


@pytest.fixture(autouse=True)
def _out(tmp_path):
    (tmp_path / "out").mkdir()


def error_of(capsys) -> str:
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    return last


class TestTensors:
    @pytest.mark.parametrize("experts", ["int8", "int4"])
    @pytest.mark.parametrize("dense", ["int8", "float16", "float32"])
    def test_of_one_file_are_what_the_quantiser_makes(self, tmp_path, target, experts, dense):
        torch.save(told()(MODEL), tmp_path / "X.pt")
        assert quantize(tmp_path / "X.pt", target, experts=experts, dense=dense) == 0
        file = assert_holds(target, wanted_tensors(MODEL, experts, dense))
        suffix = ".int8" if dense == "int8" else ""
        tied = "decoder.output_projection.weight", "decoder.embed_tokens.weight"
        assert file.about.aliases == {f"{tied[0]}{suffix}": f"{tied[1]}{suffix}"}
        assert (file.about.experts, file.about.dense) == (experts, dense)
        assert file.about.dims["decoder.layers.1.moe_layer.experts."] == (70, 96)

    def test_of_shared_and_rank_files_and_of_full_copies_are_the_same(self, tmp_path, parts, target):
        assert quantize(tmp_path / "X.pt", target) == 0
        file = assert_holds(target, wanted_tensors(MODEL, "int4", "int8"))
        assert [name for name, _ in file.about.source.files] == [part.name for part in parts]
        for shard in (0, 1):
            torch.save(whole(MODEL), tmp_path / f"Y-shard{shard}.pt")
        assert quantize(tmp_path / "Y.pt", tmp_path / "out" / "Y.safetensors") == 0
        assert_holds(tmp_path / "out" / "Y.safetensors", wanted_tensors(MODEL, "int4", "int8"))

    def test_of_16_bits_are_widened_where_they_are_no_matrices(self, tmp_path, target):
        half = {key: tensor.half() for key, tensor in MODEL.items()}
        torch.save(whole(half), tmp_path / "X.pt")
        assert quantize(tmp_path / "X.pt", target) == 0
        assert_holds(target, wanted_tensors(half, "int4", "int8"))

    def test_upstreams_older_names_are_the_releases(self, tmp_path, target):
        torch.save(whole({**MODEL, "decoder.layers.0.alpha2": torch.ones(70)}), tmp_path / "X.pt")
        assert quantize(tmp_path / "X.pt", target) == 0
        assert "decoder.layers.0.w_resid" in QuantizedFile(target).tensors()

    def test_of_a_real_checkpoint_come_with_its_state_and_dictionaries(self, shared_goldens, target):
        folder = shared_goldens / "mt_plain"
        assert quantize(folder / "checkpoint_last.pt", target, "--data", str(folder / "data-bin")) == 0
        file = QuantizedFile(target)
        dictionaries = {each.name: each.read_bytes() for each in (folder / "data-bin").glob("dict*.txt")}
        assert dictionaries and file.files() == dictionaries
        state = file.about.state
        assert (state["args"] or state["cfg"]) and state["optimizer_history"][0]["num_updates"] > 0


class TestWhatIsPrinted:
    def test_is_each_matrixs_relative_error_and_the_file_last(self, tmp_path, target, capsys):
        torch.save(told()(MODEL), tmp_path / "X.pt")
        assert quantize(tmp_path / "X.pt", target) == 0
        printed = capsys.readouterr().out
        assert printed.splitlines()[-1] == str(target)
        rows = {cells[1]: cells[2:5] for cells in (re.split(r" *\| *", line) for line in printed.splitlines()[2:-2])}
        experts = [rows[f"decoder.layers.1.moe_layer.experts.*.{part}"] for part in PARTS if "weight" in part]
        assert all(0.05 < float(mean) < float(worst) < 0.15 for mean, worst, _ in experts)
        original = MODEL["decoder.layers.0.self_attn.q_proj.weight"]
        tensors = QuantizedFile(target).tensors()
        name = "decoder.layers.0.self_attn.q_proj.weight"
        widened, _ = LinearBlock(8, 70, 70).widen(tensors[f"{name}.int8"].read()[None])
        wanted = (widened[0] - original).norm() / original.norm()
        assert float(rows[name][0]) == pytest.approx(float(wanted), abs=2e-5) and len(rows) == 1 + 2 * (2 + 2)


class TestOneFileAtATime:
    def test_files_may_come_late_and_go_early(self, tmp_path, parts, target, capsys):
        """The same file, byte by byte, as with all of them there."""
        once = tmp_path / "out" / "once.safetensors"
        assert quantize(tmp_path / "X.pt", once) == 0
        later = tmp_path / "later"
        later.mkdir()
        for part in parts:
            shutil.move(part, later / part.name)
        shutil.copy(later / "X-shared.pt", tmp_path)
        assert quantize(tmp_path / "X.pt", target) == 1
        assert error_of(capsys).endswith("X-rank-0.pt, without which nothing can begin")
        assert not list((tmp_path / "out").glob("X*"))
        shutil.copy(later / "X-rank-1.pt", tmp_path)
        assert quantize(tmp_path / "X.pt", target) == 1
        assert "waits for X-rank-0.pt: the rest is done" in error_of(capsys)
        (tmp_path / "X-shared.pt").unlink()
        (tmp_path / "X-rank-1.pt").unlink()
        assert quantize(tmp_path / "X.pt", target) == 1 and not target.exists()
        shutil.copy(later / "X-rank-0.pt", tmp_path)
        assert quantize(tmp_path / "X.pt", target) == 0
        assert target.read_bytes() == once.read_bytes()
        assert sorted(file.name for file in target.parent.iterdir()) == [target.name, once.name]

    def test_a_done_file_is_not_read_again(self, tmp_path, parts, target):
        kept = parts[2].read_bytes()
        parts[2].unlink()
        assert quantize(tmp_path / "X.pt", target) == 1
        time_ns, content = parts[1].stat().st_mtime_ns, bytearray(parts[1].read_bytes())
        values = MODEL["decoder.layers.0.moe_layer.experts.0.fc1.weight"].numpy().tobytes()
        content[content.index(values)] ^= 1  # its checksum would be wrong
        parts[1].write_bytes(content)
        os.utime(parts[1], ns=(time_ns, time_ns))
        parts[2].write_bytes(kept)
        assert quantize(tmp_path / "X.pt", target) == 0
        assert_holds(target, wanted_tensors(MODEL, "int4", "int8"))

    def test_a_run_that_was_broken_off_within_a_file_goes_on(self, tmp_path, parts, target, capsys):
        content = parts[2].read_bytes()
        model = torch.load(parts[2], weights_only=False)
        model["model"]["decoder.layers.1.moe_layer.experts.1.fc2.weight"][3, 3] = float("nan")
        torch.save(model, parts[2])
        assert quantize(tmp_path / "X.pt", target) == 1
        assert f"{parts[2]}: {EXPERT}.fc2.weight: weights must be finite numbers" in error_of(capsys)
        parts[2].write_bytes(content)
        assert quantize(tmp_path / "X.pt", target) == 0
        assert_holds(target, wanted_tensors(MODEL, "int4", "int8"))


class TestASourceThatChanged:
    @pytest.fixture
    def half_done(self, tmp_path, parts, target):
        kept = parts[2].read_bytes()
        parts[2].unlink()
        assert quantize(tmp_path / "X.pt", target) == 1
        parts[2].write_bytes(kept)
        return parts

    def test_is_refused_and_begun_anew_by_force(self, tmp_path, half_done, target, capsys):
        other = {**MODEL, f"{EXPERT[:-1]}0.fc1.weight": MODEL[f"{EXPERT}.fc1.weight"]}
        split(other, 2, tmp_path, template=told())
        assert quantize(tmp_path / "X.pt", target) == 1
        assert f"{half_done[1]}: it has changed since it was quantised into" in error_of(capsys)
        assert quantize(tmp_path / "X.pt", target, "--force") == 0
        assert_holds(target, wanted_tensors(other, "int4", "int8"))

    def test_in_its_time_alone_is_the_same(self, tmp_path, half_done, target):
        for part in half_done:
            os.utime(part, ns=(1, 1))
        assert quantize(tmp_path / "X.pt", target) == 0

    def test_to_another_model_or_other_options_is_refused(self, tmp_path, half_done, target, capsys):
        assert quantize(tmp_path / "X.pt", target, experts="int8") == 1
        assert "what an earlier run has begun is of another source or of other options" in error_of(capsys)
        half_done[0].unlink()
        assert quantize(tmp_path / "X.pt", target, dense="float32") == 1
        assert "what an earlier run has begun" in error_of(capsys)

    def test_a_file_of_another_run_is_refused(self, tmp_path, half_done, target, capsys):
        split(random_state(seed=1), 2, tmp_path / "other", template=told(updates=8))
        shutil.copy(tmp_path / "other" / "X-rank-1.pt", half_done[2])
        assert quantize(tmp_path / "X.pt", target) == 1
        words = "all files must be of one checkpoint: X-shared.pt was saved after 7 updates, this one after 8"
        assert words in error_of(capsys)

    def test_the_same_file_under_two_names_is_refused(self, tmp_path, half_done, target, capsys):
        shutil.copy(half_done[1], half_done[2])
        assert quantize(tmp_path / "X.pt", target) == 1
        assert "an expert must stand in one rank file, found the same ones in X-rank-0.pt" in error_of(capsys)


class TestBadInput:
    def refuse(self, source, target, capsys, words, *more, **options):
        assert quantize(source, target, *more, **options) == 1
        line = error_of(capsys)
        assert re.search(words, line), line
        assert not target.exists()
        return line

    @pytest.fixture
    def file(self, tmp_path):
        torch.save(whole(MODEL), tmp_path / "X.pt")
        return tmp_path / "X.pt"

    def test_no_such_source(self, tmp_path, target, capsys):
        self.refuse(tmp_path / "X.pt", target, capsys, "X.pt: there is neither X.pt nor X-shared.pt")

    def test_a_truncated_source(self, file, target, capsys):
        file.write_bytes(file.read_bytes()[:-100])
        whole_file = file.read_bytes()
        for length in (len(whole_file) - 100, len(whole_file) // 2):
            file.write_bytes(whole_file[:length])
            self.refuse(file, target, capsys, "X.pt: not a readable checkpoint: the end .* did its download break off")
        file.write_bytes(b"")
        self.refuse(file, target, capsys, "X.pt: not a readable checkpoint: it is empty; did its download break off")

    @pytest.mark.parametrize("part", ["X-shared.pt", "X-rank-0.pt", "X-rank-1.pt"])
    def test_a_truncated_part_is_named_whichever_it_is(self, tmp_path, parts, target, capsys, part):
        file = tmp_path / part
        content = file.read_bytes()
        file.write_bytes(content[:-1000])
        assert quantize(tmp_path / "X.pt", target) == 1
        assert f"{part}: not a readable checkpoint: the end of the archive is missing" in error_of(capsys)
        assert not target.exists()
        file.write_bytes(content)
        assert quantize(tmp_path / "X.pt", target) == 0
        assert_holds(target, wanted_tensors(MODEL, "int4", "int8"))

    @pytest.mark.parametrize("name", ["X.pt", "safetensors", ".safetensors", "nowhere/X.safetensors"])
    def test_a_wrong_name(self, tmp_path, file, name, capsys):
        self.refuse(file, tmp_path / "out" / name, capsys, r"--output must be X.safetensors in an existing folder")

    def test_a_target_that_is_there(self, file, target, capsys):
        target.write_text("")
        assert quantize(file, target) == 1
        assert "it exists already: give --force" in error_of(capsys) and target.read_text() == ""
        assert quantize(file, target, "--force") == 0

    def test_what_is_quantised_already(self, file, target, capsys):
        assert quantize(file, target) == 0
        self.refuse(target, target.with_name("Y.safetensors"), capsys, "X.safetensors: it is quantised already")

    @pytest.mark.parametrize(
        "part", ["self_attn.q_proj.weight", "final_layer_norm.weight", "moe_layer.experts.2.fc1.bias"]
    )
    def test_a_value_that_is_no_number(self, file, target, capsys, part):
        key = f"decoder.layers.0.{part}"
        tensor = MODEL[key].clone()
        tensor.view(-1)[1] = float("inf")
        torch.save(whole({**MODEL, key: tensor}), file)
        self.refuse(file, target, capsys, f"{key}: weights must be finite numbers")

    def test_a_value_beyond_float16(self, file, target, capsys):
        key = "decoder.layers.0.self_attn.q_proj.weight"
        torch.save(whole({**MODEL, key: 1e6 * MODEL[key]}), file)
        self.refuse(file, target, capsys, f"--dense must hold the values of {key}, up to", dense="float16")

    def test_an_expert_that_lacks_a_part(self, file, target, capsys):
        torch.save(whole({key: tensor for key, tensor in MODEL.items() if key != f"{EXPERT}.fc2.bias"}), file)
        line = self.refuse(file, target, capsys, f"{EXPERT} must have fc1.weight")
        assert not list(target.parent.iterdir()), line

    def test_a_full_disk_is_seen_before_the_first_byte(self, file, target, capsys):
        with full_at(20_000):
            self.refuse(file, target, capsys, "X.safetensors: it cannot be written: ")
        assert not list(target.parent.iterdir())

    def test_a_folder_without_dictionaries(self, tmp_path, file, target, capsys):
        self.refuse(file, target, capsys, "must be a folder with dict.txt", "--data", str(tmp_path / "out"))

    def test_what_is_no_dictionary(self, tmp_path, file, target, capsys):
        (tmp_path / "dict.txt").write_text("a b c\n")
        self.refuse(file, target, capsys, "not a fairseq dictionary", "--dictionary", str(tmp_path / "dict.txt"))

    @pytest.mark.parametrize("words", [4, 6])
    def test_a_dictionary_of_another_model(self, tmp_path, target, capsys, words):
        """9 embeddings: 4 symbols of fairseq's own, 3 words and 2 languages."""
        torch.save(told()(MODEL), tmp_path / "X.pt")
        dictionary = tmp_path / "dict.txt"
        dictionary.write_text("".join(f"w{number} 1\n" for number in range(words)))
        got = f"rows, 9, got {words + 4}, with the languages' tokens {words + 6}$"
        self.refuse(tmp_path / "X.pt", target, capsys, f"dict.txt must have .* {got}", "--dictionary", str(dictionary))
        assert not list(target.parent.iterdir())
        dictionary.write_text("".join(f"w{number} 1\n" for number in range(3)))
        assert quantize(tmp_path / "X.pt", target, "--dictionary", str(dictionary)) == 0

    def test_a_dictionary_of_one_language_has_the_embeddings_words(self, tmp_path, file, target, capsys):
        (tmp_path / "dict.txt").write_text("a 1\nb 1\n")
        words = "dict.txt must have as many words as its embeddings have rows, 9, got 6$"
        self.refuse(file, target, capsys, words, "--data", str(tmp_path))
