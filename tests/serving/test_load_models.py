"""`fairseq_moe_ext.load`: layouts, flags and several models and threads in one process, and what is left afterwards."""

import ast
import gc
import json
import sys
import threading
from pathlib import Path

import commands
import model_makers
import processes
import pytest
import torch
from python_served import PIECES, interactive, lines_of
from sentencepiece import SentencePieceTrainer

import fairseq_moe_ext as moe
from fairseq_moe_ext.buffering.store import READERS
from fairseq_moe_ext.models.moe_transformer_lm import MoETransformerLanguageModel
from fairseq_moe_ext.serving.keyword_options import OptionError
from fairseq_moe_ext.trace import load_trace


@pytest.fixture(scope="module")
def plain(shared_goldens):
    return shared_goldens / "mt_plain"


def loaded(folder, name: str = "checkpoint_last.pt", **options):
    return moe.load(folder / name, data=folder / "data-bin", **{**PIECES, **options})


@pytest.fixture(scope="module")
def wanted(plain):
    """(lines, their hypotheses by the simplest way)"""
    with loaded(plain) as served:
        lines = lines_of(served)[:6]
        return lines, served.generate(lines, beam=2)


@pytest.mark.parametrize(
    "options",
    [
        {"name": "checkpoint_merged.pt"},
        {"name": "checkpoint_last-rank-0.pt"},
        {"expert_buffer_size": 2, "expert_store": "disk"},
        {"expert_buffer_size": "auto", "expert_eviction": "lru"},
        {"moe_kernel": "loop", "moe_dtype": "float32"},
    ],
    ids=str,
)
def test_layouts_and_buffers_change_no_result(plain, wanted, tmp_path, options):
    lines, found = wanted
    if "expert_store" in options:
        options = {**options, "expert_store_dir": tmp_path}
    with loaded(plain, **options) as served:
        assert served.generate(lines, beam=2) == found


def test_models_in_one_process_do_not_know_of_each_other(plain, shared_goldens, wanted):
    lines, found = wanted
    lm = shared_goldens / "lm_top2"
    with loaded(plain) as first, moe.load(lm / "checkpoint_last.pt", data=lm / "data-bin", cpu=True) as other:
        score = other.score(["▁What ▁say ▁you ▁?"])
        with loaded(plain, expert_buffer_size=2, moe_gating="dynamic") as second:
            assert first.generate(lines, beam=2) == second.generate(lines, beam=2) == found
            assert other.score(["▁What ▁say ▁you ▁?"]) == score
        assert first.generate(lines, beam=2) == found
        assert first.report()["generation"]["sentences"] == 2 * len(lines)
    with moe.load(lm / "checkpoint_last.pt", data=lm / "data-bin", cpu=True) as other:
        assert other.score(["▁What ▁say ▁you ▁?"]) == score


def test_threads_on_one_model_are_right(plain, wanted):
    lines, found = wanted
    results: dict[int, list] = {}
    with loaded(plain, expert_buffer_size=2) as served:

        def translate(number: int) -> None:
            order = lines[number:] + lines[:number]
            results[number] = served.generate(order, beam=2)

        threads = [threading.Thread(target=translate, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results == {number: found[number:] + found[:number] for number in range(3)}


def test_sampling_draws_as_the_command_and_leaves_the_programs_numbers(plain, wanted):
    lines, _ = wanted
    options = "--sampling --sampling-topk 5 --beam 2 --nbest 2 --seed 7 --batch-size 4 --remove-bpe sentencepiece"
    by_command = interactive(plain, lines, "--task", "moe_translation", *options.split())
    with loaded(plain, seed=7) as served:
        torch.manual_seed(3)
        before = torch.get_rng_state()
        call = {"sampling": True, "sampling_topk": 5, "beam": 2, "nbest": 2, "batch_size": 4}
        found = [served.generate(lines, **call) for _ in range(2)]
        assert torch.equal(torch.get_rng_state(), before)
        assert served.generate(lines, **call, seed=8) != found[0]
        with pytest.raises(OptionError, match="nbest must be equal to beam, 2, with sampling, got 1"):
            served.generate(lines, sampling=True, beam=2)
        served.translate(lines[:1], sampling=True, beam=2)
    assert found[0] == found[1]
    words = [each.words for sentence in found[0] for each in sentence]
    assert words == [text for _, text in by_command.hypotheses()]


def test_text_goes_through_the_bpe_that_is_named(plain, tmp_path):
    corpus = tmp_path / "corpus.txt"
    with loaded(plain) as served:
        corpus.write_text("\n".join(lines_of(served)).replace(" ", "").replace("▁", " "), encoding="utf-8")
    SentencePieceTrainer.train(input=str(corpus), model_prefix=str(tmp_path / "spm"), vocab_size=200, minloglevel=2)
    lines, model = ["A man in a hat .", "Two dogs"], tmp_path / "spm.model"
    options = ("--task", "moe_translation", "--beam", "2", "--batch-size", "2", "--bpe", "sentencepiece")
    by_command = interactive(plain, lines, *options, "--sentencepiece-model", str(model))
    text = {"bpe": "sentencepiece", "sentencepiece_model": model}
    with moe.load(plain / "checkpoint_last.pt", data=plain / "data-bin", cpu=True, **text) as served:
        found = served.generate(lines, beam=2)
    assert [each[0].text for each in found] == [fields[1] for _, fields in by_command.of_kind("D")]
    assert [each[0].words for each in found] == [fields[1] for _, fields in by_command.of_kind("H")]


def test_the_dictionary_stays_as_it_is(plain, wanted):
    lines, _ = wanted
    with loaded(plain) as served:
        dictionaries = served._parts.task.source_dictionary, served._parts.task.target_dictionary
        sizes = [len(dictionary) for dictionary in dictionaries]
        served.translate(lines)
        assert [len(dictionary) for dictionary in dictionaries] == sizes


def test_report_and_trace_are_written_at_the_end(plain, wanted, tmp_path):
    lines, _ = wanted
    for end in ("close", "delete"):
        files = {"moe_report": tmp_path / f"{end}.json", "moe_trace": tmp_path / f"{end}.npz"}
        served = loaded(plain, **files)
        served.translate(lines, beam=2)
        served.translate(lines, beam=2)
        report = served.report()
        assert not files["moe_report"].exists()
        if end == "close":
            served.close()
        del served
        gc.collect()  # an error that fairseq has caught may still hold a frame
        written = json.loads(files["moe_report"].read_text())
        assert written["generation"] == report["generation"]
        assert written["generation"]["sentences"] == 12
        assert written["layers"] == report["layers"]
        assert load_trace(files["moe_trace"])


def test_an_ensemble(plain, wanted):
    lines, found = wanted
    path = plain / "checkpoint_last.pt"
    with moe.load([path, path], data=plain / "data-bin", **PIECES) as served:
        assert [each[0].words for each in served.generate(lines, beam=2)] == [each[0].words for each in found]


def test_sentences_that_are_too_long(plain, wanted):
    lines, found = wanted
    long = " ".join(["▁A"] * 60)
    with loaded(plain, max_source_positions=50) as served:
        with pytest.raises(ValueError, match="must not be longer than the model's and the task's positions, 50 and"):
            served.translate([lines[0], long])
    with loaded(plain, max_source_positions=50, skip_invalid_size_inputs_valid_test=True) as served:
        assert served.translate([lines[0], long], beam=2) == [found[0][0].text, None]
        assert served.translate([long], beam=2) == [None]


MEMORY = """
import gc, os, sys, threading, time
from pathlib import Path
import fairseq_moe_ext as moe

def state():
    rss = next(line for line in open("/proc/self/status") if line.startswith("VmRSS"))
    threads = [each for each in threading.enumerate() if each.name.startswith("experts")]
    return int(rss.split()[1]) * 1024, len(threads), len(os.listdir("/proc/self/fd"))

folder, options = Path(sys.argv[1]), eval(sys.argv[2])
after = []
for number in range(4):
    served = moe.load(folder / "X.pt", data=folder, cpu=True, **options)
    served.translate(["w1 w2 w3"] * 3, beam=2, max_len_b=6)
    during = state()
    if number % 2:
        served.close()
    del served
    end = time.monotonic() + 20
    while state()[1] and time.monotonic() < end:  # what was not closed lets its threads end by themselves
        time.sleep(0.01)
    after.append(state())
print(repr((during, after)))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """A language model of 100 MB."""
    folder = tmp_path_factory.mktemp("large")
    model_makers.dictionary().save(str(folder / "dict.txt"))
    sizes = {"decoder_embed_dim": 256, "decoder_ffn_embed_dim": 2048, "decoder_layers": 2}
    sizes |= {"decoder_attention_heads": 4, "moe_freq": 2, "moe_expert_count": 24, "moe_second_expert_policy": "all"}
    args = model_makers.arguments("moe_transformer_lm_tiny", **sizes, max_target_positions=32, tokens_per_sample=32)
    model = MoETransformerLanguageModel.build_model(args, model_makers.Vocabulary())
    cfg = {"model": {**vars(args), "_name": "moe_transformer_lm"}, "task": {"_name": "moe_language_modeling"}}
    content = {"args": None, "cfg": cfg, "model": model.state_dict(), "optimizer_history": [{"num_updates": 1}]}
    torch.save({**content, "extra_state": {}, "task_state": {}}, folder / "X.pt")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"expert_buffer_size": 4}, {"expert_buffer_size": 4, "expert_store": "disk"}])
def test_the_end_gives_memory_threads_and_files_back(large, options):
    code = [sys.executable, "-c", MEMORY, str(large), repr(options)]
    done = processes.run(code, cwd=commands.REPOSITORY, env=commands.environment(), fresh=True)
    assert done.returncode == 0, done.stderr[-2000:]
    during, after = ast.literal_eval(done.stdout.splitlines()[-1])
    threads = range(1, READERS + 1) if "expert_store" in options else [len(options)]
    assert during[1] in threads
    assert [threads for _, threads, _ in after] == [0] * 4
    assert len({files for _, _, files in after}) == 1
    memory = [bytes_ for bytes_, _, _ in after]
    # from the second on: what the first two take once is no model's
    assert max(memory) - memory[1] < 40e6 and during[0] - memory[-1] > (0 if "expert_store" in options else 60e6)
