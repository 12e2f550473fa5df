"""A converted NLLB model against transformers 4.57.6, an implementation that shares no code with this one."""

from __future__ import annotations

import json
import subprocess
import sys
from multiprocessing.connection import wait
from pathlib import Path

import commands
import hf_makers
import numpy as np
import pytest
import torch
from data_makers import MT_TRAINING, write_data
from fairseq.data import Dictionary

from fairseq_moe_ext.nllb.convert import convert_nllb
from fairseq_moe_ext.nllb.export import export_hf
from fairseq_moe_ext.nllb.hf_vocabulary import hf_rows, read_vocabulary
from fairseq_moe_ext.trace import load_trace

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
PAIR = ("eng_Latn", "deu_Latn")
BEAM, MAX_LEN = 4, 14
SOURCES = (
    "the quick brown fox jumps over the dog",
    "we sell swiss francs",
    "ten days",
    "the lazy dog of september and four foxes",
    "quick days over the brown sell",
    "fox",
    "four lazy francs jump quick",
    "september",
)
TARGETS = (
    "der schnelle hund springt",
    "faulen fuchs",
    "den faulen braune hund ueber",
    "fuchs",
    "springt schnelle",
    "der fuchs springt ueber den faulen hund",
    "ueber",
    "braune den hund der fuchs",
)


class Judge:
    """A process that has transformers (tests/hf_judge.py)."""

    def __init__(self, environment: dict[str, str], work: Path):
        self._errors = work / "stderr"
        command = [sys.executable, str(ROOT / "tests" / "hf_judge.py")]
        with open(self._errors, "w") as errors:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
            self.process = subprocess.Popen(command, env=environment, text=True, **pipes)

    def answers_to(self, questions: dict, folder: Path, work: Path) -> list:
        (work / "questions.json").write_text(json.dumps(questions))
        files = [folder, work / "questions.json", work / "answers.json"]
        print(json.dumps([*map(str, files)]), file=self.process.stdin, flush=True)
        while wait([self.process.stdout], 600) and (line := self.process.stdout.readline()):
            if line == "answered\n":
                return json.loads((work / "answers.json").read_text())
        raise AssertionError(f"no answer:\n{self._errors.read_text()[-3000:]}")

    def ask(self, folder: Path, work: Path) -> list[dict]:
        questions = {"source": SOURCES, "target": TARGETS, "source_language": PAIR[0], "target_language": PAIR[1]}
        return self.answers_to({**questions, "beam": BEAM, "max_len": MAX_LEN}, folder, work)


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    (ROOT / "build").mkdir(exist_ok=True)
    environment = hf_makers.transformers_environment(ROOT / "build")
    judge = Judge(environment, tmp_path_factory.mktemp("judge"))
    yield judge
    judge.process.kill()
    judge.process.wait()


class Served:
    """A converted model, its data, and fairseq-generate over them."""

    def __init__(self, folder: Path, work: Path, words: list[str] | None = None):
        words = hf_makers.write_dictionary(work / "dict.txt", words or hf_makers.pieces_of(folder)[::-1])
        done = convert_nllb(str(folder), str(work / "model.pt"), str(words))
        texts = dict(zip(PAIR, (SOURCES, TARGETS), strict=True))
        self.data = hf_makers.write_sentences(work / "data", folder / "sentencepiece.bpe.model", words, texts)
        self.work, self.checkpoint, self.words = work, done.files[0], words
        self.names = [*Dictionary.load(str(done.files[1])).symbols, *(f"__{code}__" for code in hf_makers.LANGUAGES)]
        self.names += ["<MINED_DATA>", "<MMT_BT_DATA>", "<SMT_BT_DATA>"] if "prefix-tags" in done.task_flags else []
        self.flags = ("--task", "moe_translation_multi_simple_epoch", "-s", PAIR[0], "-t", PAIR[1])
        self.flags += ("--lang-pairs", "-".join(PAIR), "--fixed-dictionary", done.files[1])
        self.flags += ("--lang-dict", done.files[2], *done.task_flags.split(), "--path", done.files[0], "--cpu")
        self.flags += ("--num-workers", "0", "--beam", BEAM)

    def generate(self, *more):
        lengths = () if "--score-reference" in more else ("--max-len-b", MAX_LEN, "--max-len-a", "0")
        return commands.generate(self.data, *self.flags, *lengths, *more)


OTHER = {"encoder_sparse_step": 1, "decoder_sparse_step": 4, "moe_token_dropout": 0.0, "scale_embedding": False}
OTHER |= {"normalize_router_prob_before_dropping": True}
# rows beyond the tokenizer's: its softmax has them
PADDED = {"vocab_size": 72, "activation_function": "gelu_new", "router_ignore_padding_tokens": True}


@pytest.fixture(scope="module", params=[{}, OTHER, PADDED], ids=["as NLLB-200", "other fields", "padded rows"])
def both(request, tmp_path_factory, judge):
    """(what transformers says, the served model, its folder)"""
    work = tmp_path_factory.mktemp("both")
    hf_makers.write_model(work / "hf", **request.param)
    return judge.ask(work / "hf", work), Served(work / "hf", work), work / "hf"


def test_teacher_forced_log_probabilities_and_experts_are_transformers(both, tmp_path):
    answers, served, _ = both
    trace_file = tmp_path / "trace.npz"
    found = served.generate("--score-reference", "--batch-size", "1", "--moe-trace", trace_file)
    assert len(found.batches) == len(SOURCES)
    phases = load_trace(trace_file)
    used = 0
    for number, batch in enumerate(found.batches):
        answer = answers[batch.ids[0]]
        np.testing.assert_allclose(batch.scores[0], answer["scores"], atol=1e-4)
        for phase, side in (("encoder", "encoder"), ("prefill", "decoder")):
            recorded = phases[phase]
            for layer, name in enumerate(recorded.names):
                theirs = answer["experts"][f"model.{name.removesuffix('moe_layer')}ffn.router"]
                load = np.bincount([expert for token in theirs for expert in token], minlength=8)
                assert name.startswith(side)
                np.testing.assert_array_equal(recorded.load[recorded.batch == number][:, layer].sum(axis=0), load)
                used += len(set(load[load > 0])) > 1
    assert used > len(SOURCES)  # uneven: an expert had more tokens than another
    print("largest difference of a log-probability:", max(
        np.abs(batch.scores[0] - answers[batch.ids[0]]["scores"]).max() for batch in found.batches
    ))


def test_beam_search_gives_transformers_token_ids(both):
    """Random weights say much the same of every source; the trained model below says different things."""
    answers, served, folder = both
    found = served.generate("--batch-size", "3")
    rows = dict(zip(served.names, hf_rows(read_vocabulary(folder), served.names), strict=True))
    hypotheses = dict(found.hypotheses())
    for number, answer in enumerate(answers):
        _, language, *tokens, last = answer["beam"]
        assert (language, last) == (rows["__deu_Latn__"], 2)
        assert [rows[token] for token in hypotheses[number].split() if token != "__deu_Latn__"] == [
            token for token in tokens if token != language
        ]


def test_there_and_back_gives_the_same_answers(both, judge, tmp_path):
    answers, served, folder = both
    export_hf(str(served.checkpoint), str(tmp_path / "back"), str(served.words), str(folder))
    again = judge.ask(tmp_path / "back", tmp_path)
    for theirs, ours in zip(again, answers, strict=True):
        np.testing.assert_allclose(theirs.pop("scores"), ours["scores"], atol=1e-5)
        assert theirs == {name: ours[name] for name in theirs}  # experts, beams, ids


def test_a_dense_model_is_served_as_transformers_computes_it(judge, tmp_path):
    hf_makers.write_model(tmp_path / "hf", hf_makers.DENSE)
    answers = judge.ask(tmp_path / "hf", tmp_path)
    found = Served(tmp_path / "hf", tmp_path).generate("--score-reference", "--batch-size", "3")
    for batch in found.batches:
        for number, row in zip(batch.ids, batch.scores, strict=True):
            np.testing.assert_allclose(row, answers[number]["scores"], atol=1e-4)


def test_a_trained_model_translates_the_same_there(judge, tmp_path):
    """Trained by fairseq-train to say its source backwards, then converted to Hugging Face's layout."""
    data = write_data(tmp_path / "data", ("en", "de"), splits={"train": 2000, "valid": 20, "test": 40})
    training = ("--criterion", "moe_cross_entropy", "--moe-gate-loss-wt", "0.01", "--optimizer", "adam")
    training += ("--moe-eval-capacity-token-fraction", "1.0")  # transformers drops tokens at any other; here none is
    training += ("--lr", "0.004", "--max-tokens", "500", "--max-update", "600", "--dropout", "0.0")
    training += ("--no-epoch-checkpoints", "--disable-validation", "--save-dir", tmp_path)
    training += ("--cpu", "--num-workers", "0")
    commands.run("train", data, *MT_TRAINING, *training)
    checkpoint = tmp_path / "checkpoint_last.pt"
    serving = ("--task", "moe_translation", "-s", "en", "-t", "de", "--gen-subset", "test", "--beam", BEAM, "--cpu")
    serving += ("--num-workers", "0", "--max-len-a", "0", "--max-len-b", MAX_LEN)
    found = commands.generate(data, *serving, "--path", checkpoint)
    words = Dictionary.load(str(data / "dict.en.txt"))
    sources, references, hypotheses = (dict(found.of_kind(kind)) for kind in "STH")
    encoded = [words.encode_line(sources[number][0], add_if_not_exist=False).tolist() for number in sorted(sources)]
    export_hf(str(checkpoint), str(tmp_path / "hf"))
    questions = {"source_ids": encoded, "beam": BEAM, "max_len": MAX_LEN}
    answers = judge.answers_to(questions, tmp_path / "hf", tmp_path)
    ours = [hypotheses[number][1] for number in sorted(hypotheses)]
    assert [" ".join(words[row] for row in answer[1:-1]) for answer in answers] == ours
    right = sum(ours[number] == references[number][0] for number in range(len(ours)))
    print(f"{right} of {len(ours)} translations are the references")
    assert right > 4  # what is not trained has none right


def test_half_precision_is_near(both, tmp_path):
    answers, served, folder = both
    done = convert_nllb(str(folder), str(tmp_path / "half.pt"), str(served.words), torch.float16)
    flags = [done.files[0] if flag == served.checkpoint else flag for flag in served.flags]
    found = commands.generate(served.data, *flags, "--score-reference", "--batch-size", "3")
    rows = {number: row for batch in found.batches for number, row in zip(batch.ids, batch.scores, strict=True)}
    for number, answer in enumerate(answers):
        np.testing.assert_allclose(rows[number], answer["scores"], atol=0.05)
