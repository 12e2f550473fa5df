"""A model's shape, found without memory."""

import threading

import torch
from fairseq.modules import SinusoidalPositionalEmbedding

from fairseq_moe_ext.checkpoints.model_fits import check_fits


class Loading:
    path = "x.pt"


class State(dict):
    loading = Loading()


def test_another_threads_model_has_its_values_meanwhile(monkeypatch):
    """And whichever of two builds ends first, fairseq's own function stands again afterwards."""
    monkeypatch.setattr("fairseq_moe_ext.checkpoints.model_fits.check_vocabulary", lambda *_: None)
    original = SinusoidalPositionalEmbedding.get_embedding
    wanted = original(7, 8, 1)
    inside, go_on, found = threading.Event(), threading.Event(), []

    def build():
        found.append(SinusoidalPositionalEmbedding.get_embedding(7, 8, 1).device.type)
        inside.set()
        assert go_on.wait(30)
        return torch.nn.Identity()

    builds = [threading.Thread(target=check_fits, args=(build, State())) for _ in range(2)]
    for thread in builds:
        thread.start()
    assert inside.wait(30)
    torch.testing.assert_close(SinusoidalPositionalEmbedding.get_embedding(7, 8, 1), wanted, rtol=0, atol=0)
    go_on.set()
    for thread in builds:
        thread.join()
    assert found == ["meta", "meta"]
    assert SinusoidalPositionalEmbedding.get_embedding is original
