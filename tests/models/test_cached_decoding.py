"""Decoding step by step over a cache gives what one teacher-forced pass gives."""

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
