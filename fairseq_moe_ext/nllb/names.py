"""Every tensor of an NLLB model: its name in Hugging Face's layout, its name in fairseq's, its shape.

Legend: V = vocabulary, D = model dim, F = hidden dim, E = experts. Sources: transformers 4.57's `modeling_nllb_moe.py`
and `modeling_m2m_100.py`; upstream's branch `nllb`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fairseq_moe_ext.nllb.config import SIDES, NllbConfig

# sinusoids that old versions of transformers stored; both sides compute them
COMPUTED = tuple(f"{prefix}{side}.embed_positions.weights" for side in SIDES for prefix in ("model.", ""))


@dataclass(frozen=True)
class NamedTensor:
    """hf, fairseq: its names, the first one the file's own where others are tied to it. rows: one per token."""

    hf: tuple[str, ...]
    fairseq: tuple[str, ...]
    shape: tuple[int, ...]
    rows: bool = False


def named_tensors(config: NllbConfig) -> Iterator[NamedTensor]:
    """In the order in which fairseq keeps them."""
    yield NamedTensor(
        ("model.shared.weight", *(f"model.{side}.embed_tokens.weight" for side in SIDES), "lm_head.weight"),
        ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "decoder.output_projection.weight"),
        (config.vocabulary, config.model_dim),
        rows=True,
    )
    for side in SIDES:
        for number in range(config.side(side).layers):
            yield from _layer(config, side, number)
        yield from _norm(f"model.{side}.layer_norm", f"{side}.layer_norm", config.model_dim)


def _layer(config: NllbConfig, side: str, number: int) -> Iterator[NamedTensor]:
    hf, fairseq = f"model.{side}.layers.{number}", f"{side}.layers.{number}"
    model_dim, sizes = config.model_dim, config.side(side)
    yield from _attention(f"{hf}.self_attn", f"{fairseq}.self_attn", model_dim)
    yield from _norm(f"{hf}.self_attn_layer_norm", f"{fairseq}.self_attn_layer_norm", model_dim)
    if side == "decoder":
        cross = f"{hf}.encoder_attn" if config.is_dense else f"{hf}.cross_attention"
        yield from _attention(cross, f"{fairseq}.encoder_attn", model_dim)
        yield from _norm(f"{cross}_layer_norm", f"{fairseq}.encoder_attn_layer_norm", model_dim)
    if config.experts and sizes.is_moe_layer(number):
        gate = f"{hf}.ffn.router.classifier.weight", f"{fairseq}.moe_layer.gate.wg.weight"
        yield NamedTensor((gate[0],), (gate[1],), (config.experts, model_dim))
        for expert in range(config.experts):
            names = f"{hf}.ffn.experts.expert_{expert}", f"{fairseq}.moe_layer.experts.{expert}"
            yield from _feed_forward(*names, model_dim, sizes.hidden_dim)
    else:
        yield from _feed_forward(hf if config.is_dense else f"{hf}.ffn", fairseq, model_dim, sizes.hidden_dim)
    norm = "final_layer_norm" if config.is_dense else "ff_layer_norm"
    yield from _norm(f"{hf}.{norm}", f"{fairseq}.final_layer_norm", model_dim)


def _feed_forward(hf: str, fairseq: str, model_dim: int, hidden_dim: int) -> Iterator[NamedTensor]:
    yield from _linear(f"{hf}.fc1", f"{fairseq}.fc1", (hidden_dim, model_dim))
    yield from _linear(f"{hf}.fc2", f"{fairseq}.fc2", (model_dim, hidden_dim))


def _attention(hf: str, fairseq: str, model_dim: int) -> Iterator[NamedTensor]:
    for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
        yield from _linear(f"{hf}.{name}", f"{fairseq}.{name}", (model_dim, model_dim))


def _linear(hf: str, fairseq: str, shape: tuple[int, int]) -> Iterator[NamedTensor]:
    for part, size in (("weight", shape), ("bias", shape[:1])):
        yield NamedTensor((f"{hf}.{part}",), (f"{fairseq}.{part}",), size)


def _norm(hf: str, fairseq: str, model_dim: int) -> Iterator[NamedTensor]:
    for part in ("weight", "bias"):
        yield NamedTensor((f"{hf}.{part}",), (f"{fairseq}.{part}",), (model_dim,))
