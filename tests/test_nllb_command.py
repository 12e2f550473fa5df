"""NLLB's published evaluation command, as `generate_multi.py` of upstream's branch `nllb` writes it.

Beside the file names only `--user-dir` is added and `--task` changed; `--cpu` is for the machine of the tests.
"""

import commands
import option_runs
import pytest
from data_makers import untrained_checkpoint
from option_runs import MULTI

OVERRIDES = {
    "world_size": 16,
    "moe_eval_capacity_token_fraction": 1.0,
    "use_moe_pad_mask": False,
    "pass_tokens_transformer_layer": False,
    "replication_count": 2,
}
TOKENS = ("--add-data-source-prefix-tags", "--finetune-dict-specs", "{'mono_dae': '', 'mono_lm': ''}")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_nllbs_published_command_runs(tmp_path, ranks):
    folder = option_runs.make_models(tmp_path)[MULTI]
    untrained_checkpoint(folder / "X.pt", folder / "data", *option_runs.TRAINING[MULTI], *TOKENS)
    done = commands.run(
        "generate",
        *(folder / "data", "--path", folder / "X.pt", "--task", MULTI, "--langs", "en,de", "--lang-pairs", "en-de"),
        *("--source-lang", "en", "--target-lang", "de", "--encoder-langtok", "src", "--decoder-langtok"),
        *("--gen-subset", "valid", "--beam", 4, "--bpe", "sentencepiece", "--sentencepiece-model"),
        *(folder / "pieces.model", "--sacrebleu", "--enable-m2m-validation", TOKENS[0], "--fp16", "--is-moe"),
        *("--distributed-world-size", ranks, "--distributed-port", 15000, "--model-overrides", repr(OVERRIDES)),
        *(*TOKENS[1:], "--max-sentences", 36, "--results-path", tmp_path / "out", "--cpu"),
    )
    output = (tmp_path / "out" / "generate-valid.txt").read_text(encoding="utf-8")
    assert len(commands.Generation(output.splitlines()).hypotheses()) == option_runs.SPLITS["valid"]
    assert "Generate valid with beam=4: BLEU = " in output.splitlines()[-1]  # sacrebleu's line
    assert done.stdout == ""
