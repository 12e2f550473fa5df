"""Decoding step by step over a cache gives what one teacher-forced pass gives."""

import commands
import pytest
import torch
from model_makers import language_model, sentences, translation_input, translation_model


def step_by_step(decoder, tokens: torch.Tensor, encoder_out=None) -> torch.Tensor:
    """Logits (B, L, V) of a decoder that is fed one more token at a time."""
    state, logits = {}, []
    for length in range(1, tokens.size(1) + 1):
        logits.append(decoder(tokens[:, :length], encoder_out=encoder_out, incremental_state=state)[0][:, -1:])
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize(
    "fields", [{}, {"moe_top1_expert": True}, {"moe_cmr": True}, {"moe_freq": 1, "decoder_normalize_before": False}]
)
def test_language_model(fields):
    model = language_model(**fields).eval()
    tokens = sentences()
    with torch.no_grad():
        full = model(tokens)[0]
        cached = step_by_step(model.decoder, tokens)
    real = tokens.ne(1)
    assert full[real].std() > 0.05
    torch.testing.assert_close(cached[real], full[real], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fields", [{}, {"moe_eom": 0.2}, {"moe_cmr": True}, {"encoder_normalize_before": True}])
@pytest.mark.parametrize("left_pad", [True, False])
def test_translation_model(fields, left_pad):
    model = translation_model(**fields).eval()
    net_input = translation_input(left_pad)
    tokens = net_input["prev_output_tokens"]
    with torch.no_grad():
        full = model(**net_input)[0]
        encoder_out = model.encoder(net_input["src_tokens"], net_input["src_lengths"])
        cached = step_by_step(model.decoder, tokens, encoder_out)
    real = tokens.ne(1)
    torch.testing.assert_close(cached[real], full[real], rtol=1e-4, atol=1e-5)


def test_padding_on_the_left_of_a_prompt_changes_nothing():
    """As fairseq-generate feeds a language model with prompts of several lengths."""
    model = language_model(moe_freq=1).eval()
    prompts = sentences(left_pad=True)
    with torch.no_grad():
        together = model(prompts)[0][:, -1]
        for row, prompt in enumerate(prompts):
            alone = model(prompt[prompt.ne(1)].unsqueeze(0))[0][0, -1]
            torch.testing.assert_close(together[row], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["mt_plain", "mt_nllb_ws2"])
def test_a_translation_model_that_upstream_trained(shared_goldens, name):
    folder, flags = shared_goldens / name, commands.MT if name == "mt_plain" else (*commands.NLLB, "-t", "de")
    path = ("--path", folder / "checkpoint_last.pt")
    model, task = commands.load("generate", folder / "data-bin", *path, *flags)
    task.load_dataset("test")
    sample = task.dataset("test").collater([task.dataset("test")[number] for number in range(4)])["net_input"]
    tokens = sample["prev_output_tokens"]
    with torch.no_grad():
        full = model(**sample)[0]
        encoder_out = model.encoder(sample["src_tokens"], sample["src_lengths"])
        cached = step_by_step(model.decoder, tokens, encoder_out)
    real = tokens.ne(1)
    torch.testing.assert_close(cached[real], full[real], rtol=0, atol=1e-4)
    assert full[real].std() > 0.5


@pytest.mark.parametrize("name", ["lm_top1", "lm_top2", "lm_top2_ws2"])
def test_a_language_model_that_upstream_trained(shared_goldens, name):
    folder = shared_goldens / name
    path = ("--path", folder / "checkpoint_last.pt")
    model, task = commands.load("eval_lm", folder / "data-bin", *path, *commands.LM)
    task.load_dataset("test")
    tokens = torch.stack([task.dataset("test")[number]["source"] for number in (0, 1, 2)])[:, :64]
    with torch.no_grad():
        full = model(tokens)[0]
        cached = step_by_step(model.decoder, tokens)
    torch.testing.assert_close(cached, full, rtol=0, atol=1e-4)
    assert full.std() > 0.5
