"""Rows of the embeddings by name: words stay words, languages are the tokenizer's, no row is lost or guessed."""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path

import hf_makers
import pytest
import torch
from fairseq.data import Dictionary
from safetensors.torch import load_file

from fairseq_moe_ext.checkpoints.checkpoint import read_checkpoint
from fairseq_moe_ext.checkpoints.dictionary_checksum import dictionary_checksum
from fairseq_moe_ext.checkpoints.errors import CheckpointError
from fairseq_moe_ext.nllb.convert import Converted, convert_nllb
from fairseq_moe_ext.nllb.export import export_hf
from fairseq_moe_ext.nllb.hf_vocabulary import read_vocabulary

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "convert_nllb_moe.py"
main = runpy.run_path(str(SCRIPT))["main"]
SMALL = {**hf_makers.TINY, "encoder_layers": 1, "decoder_layers": 1, "encoder_sparse_step": 0, "decoder_sparse_step": 1}
SMALL |= {"num_experts": 2, "d_model": 4, "encoder_ffn_dim": 3, "decoder_ffn_dim": 3}
NAMED = hf_makers.PIECES + 1 + len(hf_makers.LANGUAGES) + 1  # rows that the tokenizer names, <mask> the last


def write(folder: Path, rows: int = NAMED + 2) -> torch.Tensor:
    """The folder; returns its embeddings."""
    return hf_makers.write_model(folder, SMALL, shards=1, vocab_size=rows)["model.shared.weight"]


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    """A folder whose rows are NLLB-200's; not to be changed."""
    folder = tmp_path_factory.mktemp("usual") / "hf"
    write(folder)
    return folder


@pytest.fixture
def copy(usual, tmp_path):
    return Path(shutil.copytree(usual, tmp_path / "hf"))


def edit(file: Path, change) -> None:
    content = json.loads(file.read_text()) if file.is_file() else {}
    change(content)
    file.write_text(json.dumps(content))


def add_token(folder: Path, token: str, row: int, special: bool = False, listed: bool = False) -> None:
    entry = {"content": token, "special": special}
    edit(folder / "tokenizer_config.json", lambda content: content["added_tokens_decoder"].update({str(row): entry}))
    if listed:
        edit(folder / "special_tokens_map.json", lambda content: content["additional_special_tokens"].append(token))


def fast_tokenizer(folder: Path, unigram: bool) -> None:
    """tokenizer.json in the place of the other files."""
    pieces = ["<s>", "<pad>", "</s>", "<unk>", *hf_makers.pieces_of(folder)]
    vocab = (
        [[piece, -float(row)] for row, piece in enumerate(pieces)] if unigram else {p: r for r, p in enumerate(pieces)}
    )
    added = [*enumerate(pieces[:4]), *enumerate((*hf_makers.LANGUAGES, "<mask>"), len(pieces))]
    entries = [{"id": row, "content": token, "special": True} for row, token in added]
    model = {"type": "Unigram" if unigram else "BPE", "vocab": vocab}
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": entries, "model": model}))
    for name in ("sentencepiece.bpe.model", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink()


def served_names(done: Converted) -> list[str]:
    """Every row's name as fairseq's task has it, by the files and flags that the converter gives."""
    names = Dictionary.load(str(done.files[1])).symbols
    names += [f"__{code}__" for code in done.files[2].read_text().split()]
    tags = ["<MINED_DATA>", "<MMT_BT_DATA>", "<SMT_BT_DATA>"]
    return names + (tags if "--add-data-source-prefix-tags" in done.task_flags else [])


def rows_by_name(done: Converted) -> dict[str, torch.Tensor]:
    state = read_checkpoint(str(done.files[0]))
    names, model = served_names(done), state["model"]
    rows = model["encoder.embed_tokens.weight"].read()
    assert len(names) == len(set(names)) == len(rows)
    assert state["extra_state"]["dictionary_checksum"] == dictionary_checksum(names)
    assert torch.equal(model["decoder.output_projection.weight"].read(), rows)
    return dict(zip(names, rows, strict=True))


def fails(folder: Path, tmp_path: Path, match: str, *arguments) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        convert_nllb(str(folder), str(tmp_path / "x.pt"), *arguments)
    assert "\n" not in str(caught.value) and not list(tmp_path.glob("x.pt*"))


class TestAddedTokens:
    @pytest.mark.parametrize(
        "token, special, listed",
        [
            *(("Kubernetes", False, False), ("two words", False, False), ("<ent>", True, True), ("<sep>", True, False)),
            *(("xyz_Word", False, False), ("foo_bar", True, True), ("eng_latn", True, True), ("__tag__", True, True)),
            ("abc_Defg", True, False),  # of a language's form, but not in the tokenizer's list
        ],
    )
    def test_what_is_no_language_stays_a_word(self, tmp_path, caplog, token, special, listed):
        theirs = write(tmp_path / "hf", NAMED + 1)
        add_token(tmp_path / "hf", token, NAMED, special, listed)
        with caplog.at_level("INFO", logger="fairseq_moe_ext"):
            done = convert_nllb(str(tmp_path / "hf"), str(tmp_path / "x.pt"))
        assert done.files[2].read_text().split() == list(hf_makers.LANGUAGES)
        rows = rows_by_name(done)
        assert torch.equal(rows[token], theirs[NAMED]) and torch.equal(rows["__deu_Latn__"], theirs[NAMED - 3])
        assert "1 added tokens are no language codes" in caplog.text and token in caplog.text

    def test_a_language_that_a_user_added_is_one(self, tmp_path):
        theirs = write(tmp_path / "hf", NAMED + 1)
        add_token(tmp_path / "hf", "tyv_Cyrl", NAMED, special=True, listed=True)
        done = convert_nllb(str(tmp_path / "hf"), str(tmp_path / "x.pt"))
        assert done.files[2].read_text().split() == [*hf_makers.LANGUAGES, "tyv_Cyrl"]
        assert torch.equal(rows_by_name(done)["__tyv_Cyrl__"], theirs[NAMED])

    @pytest.mark.parametrize("file", ["added_tokens.json", "tokenizer.json"])
    def test_words_of_every_file_are_found(self, tmp_path, file):
        theirs = write(tmp_path / "hf", NAMED + 1)
        if file == "tokenizer.json":
            fast_tokenizer(tmp_path / "hf", unigram=False)
            entry = {"id": NAMED, "content": "Kubernetes", "special": False}
            edit(tmp_path / "hf" / file, lambda content: content["added_tokens"].append(entry))
        else:
            edit(tmp_path / "hf" / file, lambda content: content.update(Kubernetes=NAMED))
        done = convert_nllb(str(tmp_path / "hf"), str(tmp_path / "x.pt"))
        assert torch.equal(rows_by_name(done)["Kubernetes"], theirs[NAMED])

    def test_the_trainings_dictionary_need_not_have_them(self, tmp_path):
        theirs = write(tmp_path / "hf", NAMED + 1)
        add_token(tmp_path / "hf", "Kubernetes", NAMED)
        words = hf_makers.pieces_of(tmp_path / "hf")[::-1]
        file = hf_makers.write_dictionary(tmp_path / "dict.txt", words)
        done = convert_nllb(str(tmp_path / "hf"), str(tmp_path / "x.pt"), str(file))
        assert served_names(done)[4 : 4 + len(words)] == words  # ids of data that was binarised with it
        assert torch.equal(rows_by_name(done)["Kubernetes"], theirs[NAMED])

    @pytest.mark.parametrize("token", ["two\nlines", "two\rlines", "\ud800", ""])
    def test_what_no_dictionary_can_hold_is_refused(self, tmp_path, token):
        write(tmp_path / "hf", NAMED + 1)
        add_token(tmp_path / "hf", token, NAMED)
        fails(tmp_path / "hf", tmp_path, f"row {NAMED}: a dictionary's file cannot hold the token")


class TestRows:
    @pytest.mark.parametrize("rows", [NAMED - 1, NAMED, NAMED + 1, NAMED + 3, NAMED + 4, 72, 128])
    def test_every_row_is_kept_and_none_is_named_by_a_guess(self, tmp_path, caplog, rows):
        """As resize_token_embeddings leaves them, padded to a multiple or not; transformers' softmax has them all."""
        theirs = write(tmp_path / "hf", rows)
        with caplog.at_level("INFO", logger="fairseq_moe_ext"):
            done = convert_nllb(str(tmp_path / "hf"), str(tmp_path / "x.pt"))
        assert "--add" not in done.task_flags and "--finetune" not in done.task_flags
        found = rows_by_name(done)
        for name, row in read_vocabulary(tmp_path / "hf").names.items():
            assert row >= rows or torch.equal(found[name], theirs[row]), name
        assert sorted(map(tuple, torch.stack([*found.values()]).tolist())) == sorted(map(tuple, theirs.tolist()))
        surplus = max(0, rows - NAMED)
        fillers = [name for name in found if name.startswith("madeupword")]
        assert fillers == [f"madeupword{number:04d}" for number in range(surplus)]
        assert (f"{surplus} rows of the embeddings have no token: they are kept" in caplog.text) is (surplus > 0)

    def test_three_rows_are_taken_for_nllbs_tags_and_said_to_be(self, usual, tmp_path, caplog):
        with caplog.at_level("INFO", logger="fairseq_moe_ext"):
            done = convert_nllb(str(usual), str(tmp_path / "x.pt"))
        assert done.task_flags.endswith("--add-data-source-prefix-tags") and len(rows_by_name(done)) == NAMED + 2
        assert "by their number alone" in caplog.text

    @pytest.mark.parametrize("rows", [NAMED + 2, 72])
    def test_there_and_back_with_the_written_dictionary(self, tmp_path, rows):
        theirs = write(tmp_path / "hf", rows)
        add_token(tmp_path / "hf", "Kubernetes", NAMED)
        done = convert_nllb(str(tmp_path / "hf"), str(tmp_path / "x.pt"))
        pieces = hf_makers.write_dictionary(tmp_path / "dict.txt", hf_makers.pieces_of(tmp_path / "hf"))
        for number, words in enumerate((None, str(pieces), str(done.files[1]))):
            back = tmp_path / f"back{number}"
            export_hf(str(done.files[0]), str(back), words, str(tmp_path / "hf"))
            assert torch.equal(load_file(back / "model.safetensors")["model.shared.weight"], theirs)
        again = convert_nllb(str(back), str(tmp_path / "again.pt"), str(done.files[1]))
        assert served_names(again) == served_names(done)

    def test_more_tokens_than_rows(self, tmp_path):
        write(tmp_path / "hf", NAMED - 2)
        fails(tmp_path / "hf", tmp_path, "the tokenizer is of another vocabulary: .* the embeddings have 63 rows")

    def test_a_token_far_beyond_the_rows(self, tmp_path):
        write(tmp_path / "hf", NAMED + 4)
        add_token(tmp_path / "hf", "Kubernetes", 500)
        fails(tmp_path / "hf", tmp_path, "'Kubernetes' has row 500, the embeddings have 69 rows")


class TestTokenizerFiles:
    def test_a_unigram_tokenizer_json_names_the_rows(self, usual, copy, tmp_path):
        fast_tokenizer(copy, unigram=True)
        assert read_vocabulary(copy) == read_vocabulary(usual)
        found, wanted = (convert_nllb(str(f), str(tmp_path / f"{i}.pt")) for i, f in enumerate((copy, usual)))
        assert served_names(found) == served_names(wanted)

    @pytest.mark.parametrize("lists", ["additional_special_tokens", "extra_special_tokens"])
    def test_lists_alone_name_the_rows(self, usual, copy, lists):
        (copy / "tokenizer_config.json").write_text(json.dumps({lists: list(hf_makers.LANGUAGES)}))
        (copy / "special_tokens_map.json").unlink()
        assert read_vocabulary(copy) == read_vocabulary(usual)

    @pytest.mark.parametrize(
        "model, match",
        [
            ({"type": "BPE", "vocab": {}}, "tokenizer.json: its vocabulary, model.vocab, is empty"),
            ({"type": "Unigram", "vocab": []}, "tokenizer.json: its vocabulary, model.vocab, is empty"),
            ({"type": "BPE"}, "tokenizer.json: model.vocab must map pieces to rows .* got nothing"),
            ([1], "tokenizer.json: model.vocab must map pieces to rows .* got nothing"),
            (None, "tokenizer.json: model.vocab must map pieces to rows"),
            ({"vocab": {"a": "4"}}, "tokenizer.json: model.vocab must map pieces to rows"),
            ({"vocab": ["a"]}, "tokenizer.json: model.vocab must hold pairs of a piece and its score"),
            ({"vocab": [["a", 0], ["a", 1]]}, "tokenizer.json: model.vocab must hold every piece once, 1 repeat"),
            ({"vocab": {"a": 4, "b": 4}}, "give 'b' and 'a' one row, 4"),
            ({"vocab": {"a": 2}}, "give 'a' and '</s>' one row, 2"),
        ],
    )
    def test_what_is_wrong_with_tokenizer_json_is_said(self, copy, tmp_path, model, match):
        fast_tokenizer(copy, unigram=False)
        edit(copy / "tokenizer.json", lambda content: content.update(model=model))
        fails(copy, tmp_path, match)

    @pytest.mark.parametrize(
        "entry", ["deu_Latn", {"content": "deu_Latn"}, {"content": 3, "id": 3}, {"id": -1, "content": ""}]
    )
    @pytest.mark.parametrize(
        "file, row", [("tokenizer.json", ""), ("tokenizer_config.json", "x"), ("tokenizer_config.json", "9" * 5000)]
    )
    def test_an_added_token_without_text_or_row(self, copy, tmp_path, entry, file, row):
        if file == "tokenizer.json":
            fast_tokenizer(copy, unigram=False)
            edit(copy / file, lambda content: content.update(added_tokens=[entry]))
        else:
            edit(copy / file, lambda content: content.update(added_tokens_decoder={row: entry}))
        fails(copy, tmp_path, f"{file}: every added token must have a text and a row")

    def test_files_that_disagree(self, copy, tmp_path):
        row = NAMED - 3
        edit(copy / "added_tokens.json", lambda content: content.update(deu_Latn=row + 1))
        fails(copy, tmp_path, f"added_tokens.json: 'deu_Latn' must stand in one row, got {row + 1}, in .* {row}")

    def test_two_tokenizers_that_disagree(self, copy, tmp_path):
        spm = (copy / "sentencepiece.bpe.model").read_bytes()
        fast_tokenizer(copy, unigram=True)
        (copy / "sentencepiece.bpe.model").write_bytes(spm)
        edit(copy / "tokenizer.json", lambda content: content["model"]["vocab"].insert(9, ["other", 0.0]))
        fails(copy, tmp_path, "tokenizer.json: 'other' must stand in sentencepiece.bpe.model's row None, got 9")

    def test_another_tokenizer_numbers_the_rows(self, copy, tmp_path):
        (copy / "vocab.json").write_text("{}")
        fails(copy, tmp_path, "vocab.json: a tokenizer other than NLLB's")

    def test_what_is_not_there_is_not_there(self, copy, tmp_path):
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            (copy / name).unlink()
        fails(copy, tmp_path, "its language codes stand in none of tokenizer.json, tokenizer_config.json")
        (copy / "sentencepiece.bpe.model").unlink()
        fails(copy, tmp_path, "must hold sentencepiece.bpe.model or tokenizer.json")

    @pytest.mark.parametrize("value, match", [(3, "must be a list, got int"), ([3], "must hold tokens' texts")])
    def test_a_list_that_is_none(self, copy, tmp_path, value, match):
        edit(copy / "special_tokens_map.json", lambda content: content.update(additional_special_tokens=value))
        fails(copy, tmp_path, f"special_tokens_map.json: additional_special_tokens {match}")

    def test_added_tokens_without_a_language(self, copy, tmp_path):
        (copy / "special_tokens_map.json").unlink()
        (copy / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {"61": {"content": "a b"}}}))
        fails(copy, tmp_path, "none of its 1 added tokens is a special one like eng_Latn")


class TestExport:
    def test_the_checkpoints_own_languages_order_the_rows(self, usual, tmp_path):
        """As of a training whose --langs stood in another order than the tokenizer's languages."""
        done = convert_nllb(str(usual), str(tmp_path / "x.pt"))
        state = torch.load(done.files[0], weights_only=False)
        rows = state["model"]["encoder.embed_tokens.weight"]
        names = served_names(done)
        languages = ["fra_Latn", "eng_Latn", "deu_Latn"]
        others = [name for name in names if name[2:-2] not in languages]
        order = [*others[:-3], *(f"__{code}__" for code in languages), *others[-3:]]
        moved = rows[[names.index(name) for name in order]]
        for name in ("encoder.embed_tokens", "decoder.embed_tokens", "decoder.output_projection"):
            state["model"][f"{name}.weight"] = moved
        state["args"].langs, state["extra_state"] = languages, {}
        torch.save(state, tmp_path / "y.pt")
        export_hf(str(tmp_path / "y.pt"), str(tmp_path / "back"), str(done.files[1]), str(usual))
        found, wanted = (load_file(folder / "model.safetensors") for folder in (tmp_path / "back", usual))
        assert torch.equal(found["model.shared.weight"], wanted["model.shared.weight"])
        with pytest.raises(CheckpointError, match="--dictionary must be given: the checkpoint does not say"):
            export_hf(str(tmp_path / "y.pt"), str(tmp_path / "no"), None, str(usual))

    def test_another_order_of_the_words_is_refused(self, usual, tmp_path):
        words = hf_makers.pieces_of(usual)
        file = hf_makers.write_dictionary(tmp_path / "dict.txt", words[::-1])
        convert_nllb(str(usual), str(tmp_path / "x.pt"), str(file))
        other = hf_makers.write_dictionary(tmp_path / "other.txt", [*words[1::-1], *words[2:]])
        for dictionary in (None, str(other)):
            with pytest.raises(CheckpointError, match="must be the one that the checkpoint was converted with"):
                export_hf(str(tmp_path / "x.pt"), str(tmp_path / "back"), dictionary, str(usual))
        assert not (tmp_path / "back").exists()

    def test_a_dictionary_without_a_tokenizer_has_no_effect_and_is_refused(self, usual, tmp_path, capsys):
        done = convert_nllb(str(usual), str(tmp_path / "x.pt"))
        words = ("--dictionary", str(done.files[1]))
        assert main([str(done.files[0]), "--to-hf", "--output", str(tmp_path / "back"), *words]) == 1
        assert capsys.readouterr().err.splitlines()[-1].startswith("error: --dictionary goes with --tokenizer")
