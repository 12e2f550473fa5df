"""fairseq's own doors from Python: loading functions, `from_pretrained` and hub interfaces, on the first call."""

import sys

import commands
import processes
import pytest
import torch
from fairseq import checkpoint_utils
from fairseq.models.transformer import TransformerModel
from fairseq.models.transformer_lm import TransformerLanguageModel

FIRST_AND_SECOND = """
import argparse, sys
import {first}
from fairseq import checkpoint_utils, utils
from fairseq.models.transformer import TransformerModel
utils.import_user_module(argparse.Namespace(user_dir={user_dir!r}))
found = []
for _ in range(2):
    hub = TransformerModel.from_pretrained({folder!r}, "checkpoint_merged.pt", {folder!r} + "/data-bin")
    models, cfg, task = checkpoint_utils.load_model_ensemble_and_task(
        [{folder!r} + "/checkpoint_merged.pt"], arg_overrides={{"data": {folder!r} + "/data-bin"}}
    )
    found.append((hub.translate(["A man ."], beam=2), type(task).__name__, type(models[0]).__name__))
print(found[0] == found[1], found[0][1:])
"""


@pytest.mark.parametrize("first", ["fairseq", pytest.param("fairseq_moe_ext", marks=pytest.mark.slow)])
def test_the_first_load_in_a_process_succeeds_as_the_second(shared_goldens, first):
    code = FIRST_AND_SECOND.format(
        first=first, user_dir=str(commands.USER_DIR), folder=str(shared_goldens / "mt_plain")
    )
    done = processes.run([sys.executable, "-c", code], cwd=commands.REPOSITORY, env=commands.environment(), fresh=True)
    assert done.stdout.splitlines()[-1:] == ["True ('MoETranslationTask', 'MoETransformerModel')"], done.stderr[-3000:]
