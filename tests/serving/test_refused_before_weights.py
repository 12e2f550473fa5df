"""What a checkpoint's own configuration rules out is refused before any of its weights is read."""

import commands
import pytest
import torch
from small_lm import small_lm

from fairseq_moe_ext.checkpoints.errors import CheckpointError


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """(data, checkpoint) of a language model with 8 experts, of which no weight can be read."""
    folder = tmp_path_factory.mktemp("damaged")
    data, content = small_lm(folder)
    torch.save(content, folder / "X.pt")
    file = bytearray((folder / "X.pt").read_bytes())
    for tensor in content["model"].values():
        file[file.index(tensor.numpy().tobytes()) + 1] ^= 4
    (folder / "X.pt").write_bytes(file)
    return data, folder / "X.pt"


def serve(damaged, *flags) -> None:
    data, checkpoint = damaged
    commands.eval_lm(data, "--path", checkpoint, *commands.LM, *flags)


def test_the_weights_cannot_be_read(damaged):
    with pytest.raises(CheckpointError, match="is damaged"):
        serve(damaged)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--future-target",), "--future-target must be as in .*, False, got True"),
        (("--moe-capacity-factor", "1", "--moe-virtual-ranks", "9"), "--moe-virtual-ranks must be at most .* 8, got 9"),
    ],
    ids=["another target", "more virtual ranks than experts"],
)
def test_a_flag_that_the_configuration_rules_out(damaged, flags, words):
    with pytest.raises((CheckpointError, ValueError), match=f"^{words}"):
        serve(damaged, *flags)
