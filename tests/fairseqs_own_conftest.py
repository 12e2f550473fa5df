"""conftest.py of a copy of fairseq's own tests, whose transformers it makes MoE models of: test_fairseq_own_tests.py.

Nothing of fairseq's tests is changed: the arguments that they hand to fairseq's parser are, and the classes that they
import. PLUGIN names the folder for --user-dir.
"""

import os
from argparse import Namespace

import pytest
from fairseq import options, utils
from fairseq.models import transformer
from fairseq.tasks import language_modeling

utils.import_user_module(Namespace(user_dir=os.environ["PLUGIN"]))

from fairseq_moe_ext.models.moe_transformer import MoETransformerModel  # noqa: E402
from fairseq_moe_ext.tasks.moe_language_modeling import (  # noqa: E402
    MoELanguageModelingConfig,
    MoELanguageModelingTask,
)

TASKS = {name: f"moe_{name}" for name in ("translation", "translation_multi_simple_epoch", "language_modeling")}
ARCHS = dict.fromkeys(("fconv_iwslt_de_en", "transformer", "transformer_iwslt_de_en"), "moe_transformer")
ARCHS |= dict.fromkeys(("transformer_lm", "transformer_lm_gpt2_tiny"), "moe_transformer_lm")
SMALL = {"layers": 2, "embed-dim": 8, "ffn-embed-dim": 8, "attention-heads": 2}
EXPERTS = ("--moe-expert-count", "4", "--moe-freq", "2")
trained_by: dict[str, str | None] = {"task": None}  # the model that was trained last
parse = options.parse_args_and_arch


def with_experts(parser, arguments=None, *args, **kwargs):
    """fairseq's, of the plugin's tasks and architectures where the arguments name fairseq's."""
    if arguments is not None:
        arguments = _serving(list(arguments)) if "--arch" not in arguments else _training(list(arguments))
    return parse(parser, arguments, *args, **kwargs)


def _training(arguments: list[str]) -> list[str]:
    task, arch = (_value(arguments, name) for name in ("--task", "--arch"))
    trained_by["task"] = TASKS.get(task) if arch in ARCHS else None
    if trained_by["task"] is None:
        return arguments
    arguments[arguments.index("--task") + 1] = TASKS[task]
    arguments[arguments.index("--arch") + 1] = ARCHS[arch]
    for side in ("decoder",) if task == "language_modeling" else ("encoder", "decoder"):
        for name, value in SMALL.items():
            if f"--{side}-{name}" not in arguments:
                arguments += [f"--{side}-{name}", str(value)]
    return [*arguments, *EXPERTS]


def _serving(arguments: list[str]) -> list[str]:
    if "--path" not in arguments or trained_by["task"] is None:
        return arguments
    if "--task" not in arguments:
        # blocks that are longer than the model's positions fairseq-eval-lm leaves out silently, and the plugin never:
        # these are the trainings'
        length = ["--tokens-per-sample", "500"] if trained_by["task"] == TASKS["language_modeling"] else []
        return [*arguments, "--task", trained_by["task"], *length]
    arguments[arguments.index("--task") + 1] = trained_by["task"]
    return arguments


def _value(arguments: list[str], name: str) -> str | None:
    return arguments[arguments.index(name) + 1] if name in arguments else None


class TransformerWithExperts(MoETransformerModel):
    """In the place of the class that fairseq's tests of models build."""

    @classmethod
    def build_model(cls, args, task):
        args.moe_freq, args.moe_expert_count, args.moe_second_expert_policy = 1, 4, "all"
        return super().build_model(args, task)


options.parse_args_and_arch = with_experts
transformer.TransformerModel = TransformerWithExperts  # before the tests import it
language_modeling.LanguageModelingTask = MoELanguageModelingTask
language_modeling.LanguageModelingConfig = MoELanguageModelingConfig


@pytest.fixture(autouse=True)
def nothing_trained_before():
    trained_by["task"] = None
