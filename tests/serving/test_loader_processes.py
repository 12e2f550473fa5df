"""Data sets that a served command's loader processes get by pickle, as `spawn` and `forkserver` hand them over."""

import pickle
import sys

import commands
import data_makers
import numpy as np
import processes
import pytest
import torch
from fairseq.data import LanguagePairDataset
from model_makers import dictionary

from fairseq_moe_ext.decoding.generator import keep_every_sentence

PROGRAM = """
import multiprocessing, sys
if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv.pop(1))
    from fairseq_cli import eval_lm
    eval_lm.cli_main()
"""


def test_a_data_set_that_keeps_every_sentence_survives_a_pickle():
    dataset = LanguagePairDataset([torch.arange(4)] * 5, [4] * 5, dictionary())
    for _ in range(2):
        keep_every_sentence(dataset)
        dataset = pickle.loads(pickle.dumps(dataset))
        batches = dataset.batch_by_size(np.arange(5), max_sentences=4, required_batch_size_multiple=4)
        assert [batch.tolist() for batch in batches] == [[0, 1, 2, 3], [4]]
        assert dataset.batch_by_size(np.arange(0)) == []


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_loader_processes_of_every_start_method_serve_the_same(tmp_path, method):
    data = data_makers.write_data(tmp_path / "data")
    data_makers.untrained_checkpoint(tmp_path / "x.pt", data, *data_makers.LM_TRAINING)
    (tmp_path / "program.py").write_text(PROGRAM, encoding="utf-8")
    arguments = (data, "--path", tmp_path / "x.pt", *commands.LM, "--tokens-per-sample", "16")
    command = [sys.executable, tmp_path / "program.py", method, *arguments, "--user-dir", commands.USER_DIR]
    done = processes.run([*command, "--num-workers", "2"], env=commands.environment(), fresh=True)
    assert done.returncode == 0, done.stderr[-3000:]
    wanted = commands.run("eval-lm", *arguments)
    assert done.stderr.count("Loss (base 2)") == 1
    assert [line.split("Loss")[1] for line in done.stderr.splitlines() if "Loss (base 2)" in line] == [
        line.split("Loss")[1] for line in wanted.stderr.splitlines() if "Loss (base 2)" in line
    ]
