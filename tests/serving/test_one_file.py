"""Raw text in, raw text out of one quantised checkpoint: its own dictionary, languages and SentencePiece model."""

import os
import shutil
from pathlib import Path

import commands
import hf_makers
import pytest
from quantized_goldens import SPM, write_golden, write_nllb

import fairseq_moe_ext as moe
from fairseq_moe_ext.checkpoints.errors import CheckpointError
from fairseq_moe_ext.command_line import plan
from fairseq_moe_ext.serving.keyword_options import OptionError

LINES = ["the quick brown fox", "we sell four swiss francs"]
SEARCH = {"beam": 2, "max_len_b": 12}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with the floats, model.pt and its data, and X.safetensors."""
    folder = tmp_path_factory.mktemp("nllb")
    write_nllb(folder)
    write_golden(folder / "empty.safetensors", folder / "model.pt", "int4", "int8", {})
    return folder


@pytest.fixture
def path(made, tmp_path):
    """The file alone, in a folder of its own."""
    return Path(shutil.copy(made / "X.safetensors", tmp_path / "X.safetensors"))


@pytest.fixture(scope="module")
def translated(made):
    """By the floats, quantised while they are loaded, and files beside them."""
    data = made / "data"
    data.mkdir()
    for language in hf_makers.LANGUAGES:
        shutil.copy(made / "model.dict.txt", data / f"dict.{language}.txt")
    text = {"bpe": "sentencepiece", "sentencepiece_model": made / "hf" / SPM}
    languages = {"source_lang": "eng_Latn", "target_lang": "deu_Latn", "lang_pairs": "eng_Latn-deu_Latn"}
    quantized = {"moe_weights": "int4", "moe_weights_scope": "all", "cpu": True}
    with moe.load(made / "model.pt", data, **text, **languages, **quantized) as served:
        return served.generate(LINES, **SEARCH), served.translate(LINES, target_lang="fra_Latn", **SEARCH)


def test_from_python_with_no_other_file(path, translated):
    german, french = translated
    with moe.load(path, cpu=True) as served:
        assert served.translate(LINES, "eng_Latn", "deu_Latn", **SEARCH) == [found[0].text for found in german]
        assert served.generate(LINES, "eng_Latn", "deu_Latn", **SEARCH) == german
        assert served.translate(LINES, source_lang="eng_Latn", target_lang="fra_Latn", **SEARCH) == french
        assert all("▁" not in text for text in french)
        for languages, words in (
            ((), "source_lang must be given to load\\(\\) or to this call for a multilingual model, got none"),
            (("eng_Latn",), "target_lang must be given to load"),
            (("eng_Latn", "xx"), "target_lang must be of the model's languages, eng_Latn, deu_Latn, fra_Latn, got"),
        ):
            with pytest.raises(OptionError, match=f"^{words}"):
                served.translate(LINES, *languages)
        with served.engine() as engine:
            with pytest.raises(OptionError, match="^source_lang must be given to load"):
                engine.submit(LINES[0])
            request = engine.submit(LINES[0], source_lang="eng_Latn", target_lang="deu_Latn", **SEARCH)
            engine.run()
            assert request.result()[0].text == german[0][0].text
        folder = Path(served._parts.data)
        assert {file.name for file in folder.iterdir()} == {"dict.txt", "langs.txt", SPM}
    assert not folder.exists() and [file.name for file in path.parent.iterdir()] == ["X.safetensors"]
    with moe.load(path, cpu=True, source_lang="eng_Latn", target_lang="fra_Latn", expert_buffer_size=2,
                  expert_store="disk") as served:
        assert served.translate(LINES, **SEARCH) == french


def test_fairseq_interactive_takes_it_as_its_data(path, translated, monkeypatch, tmp_path):
    german, _ = translated
    (tmp_path / "t").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "t"))
    arguments = ("--task", "moe_translation_multi_simple_epoch", "-s", "eng_Latn", "-t", "deu_Latn", "--beam", 2)
    more = ("--max-len-b", 12, "--cpu", "--buffer-size", 2, "--batch-size", 2)
    done = commands.run("interactive", path, "--path", path, *arguments, *more, stdin="\n".join(LINES) + "\n")
    found = commands.Generation(done.stdout.splitlines())
    assert [fields[1] for _, fields in found.of_kind("D")] == [each[0].text for each in german]
    assert os.listdir(tmp_path / "t") == []  # what it was read from is gone
    done = commands.run("generate", path, "--path", path, *arguments, check=False)
    assert f"data must be a folder with a data set in fairseq-generate, got the checkpoint {path}" in done.stderr
    assert done.returncode != 0 and "Traceback" not in done.stderr


def test_pieces_are_taken_where_the_user_says_how_text_is_cut(path, translated):
    german, _ = translated
    with moe.load(path, cpu=True, post_process="sentencepiece") as served:
        pieces = ["▁ the ▁ q u ick ▁ b ro w n ▁fox"]
        (text,) = served.translate(pieces, "eng_Latn", "deu_Latn", **SEARCH)
        assert "▁" not in text


@pytest.mark.parametrize("name, words", [
    ("empty.safetensors", "it has no dictionary in it: data must name the folder with the model's"),
    ("nothing.safetensors", "no such file"),
])
def test_a_file_without_a_dictionary_is_refused(made, name, words):
    with pytest.raises(CheckpointError, match=f"{name}: {words}$"):
        moe.load(made / name, cpu=True)


def test_a_name_that_leads_elsewhere_is_refused(made, tmp_path):
    write_golden(tmp_path / "X.safetensors", made / "model.pt", "int8", "float32", {"../dict.txt": b"a 1\n"})
    with pytest.raises(CheckpointError, match=r"has no file of such a name, got '\.\./dict\.txt'$"):
        moe.load(tmp_path / "X.safetensors", cpu=True)


def test_plan_counts_with_the_files_format(path, capsys):
    assert plan.main([str(path), "--device-memory", "24GB"]) == 0
    printed = capsys.readouterr().out
    assert "experts in int4, dense layers in int8" in printed and "--moe-weights" not in printed
    assert "--expert-store disk" in printed and "--expert-store-dir" not in printed
    assert plan.main([str(path)]) == 0
    printed = capsys.readouterr().out
    assert "int4, dense int8" in printed and "float16 " not in printed.split("With ")[0]
    assert plan.main([str(path), "--device-memory", "24GB", "--moe-weights", "int8"]) == 1
    assert "--moe-weights must be int4 or be left out" in capsys.readouterr().err
