"""fairseq 0.12.2, whose encoder layers compute past the experts, is refused before anything is loaded."""

import commands
import pytest
from fairseq import tasks
from fairseq.modules.transformer_layer import TransformerEncoderLayerBase
from model_makers import translation_model

from fairseq_moe_ext.models.fairseq_version import check_fairseq

REFUSED = "^fairseq must be without the encoder's fast path of release 0.12.2.*, got 0.12"


def test_the_fast_path_is_refused(shared_goldens, monkeypatch):
    golden = shared_goldens / "mt_plain"
    cfg = commands.parse("generate", golden / "data-bin", "--path", golden / "no-such-file.pt", *commands.MT)
    check_fairseq()
    # release 0.12.2 has such a method, which makes the copies
    monkeypatch.setattr(TransformerEncoderLayerBase, "_load_from_state_dict", lambda *_: None, raising=False)
    with pytest.raises(ValueError, match=REFUSED):
        tasks.setup_task(cfg.task)
    with pytest.raises(ValueError, match=REFUSED):  # by fairseq's own tasks
        translation_model()
