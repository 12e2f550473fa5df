"""What continuous batching is asked for: batches, room for their sentences, each on its way; and what it refuses."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fairseq.models.transformer import TransformerDecoderBase
from torch import Tensor

# options of generation under which a sentence's search is not its own, or that this search does not have
_REFUSED = {
    "constraints": None,
    "diverse_beam_groups": -1,
    "diversity_rate": -1,
    "lm_path": None,
    "match_source_len": False,
    "no_repeat_ngram_size": 0,
    "print_alignment": None,
    "retain_dropout": False,
    "sampling": False,
}


def check_options(generation: Any, models: Sequence) -> None:
    """Raise ValueError where fairseq's `generation` options, or the models, and continuous batching exclude each other.

    A model's decoder must be fairseq's transformer, whose state can be taken apart.
    """
    for name, without in _REFUSED.items():
        value = getattr(generation, name, without)
        if value not in (without, False, None):
            raise ValueError(f"--continuous-batching goes without --{name.replace('_', '-')}, got {value}")
    if len(models) != 1:
        raise ValueError(f"--continuous-batching serves one model, got an ensemble of {len(models)}")
    for name, layer in getattr(models[0], "moe_layers", dict)().items():
        if layer.gate.is_random:
            raise ValueError(
                "--continuous-batching needs results that do not depend on a sentence's batch: "
                "moe_second_expert_policy must be all (--model-overrides), "
                f"got {layer.gate.second_expert_policy} in {name}"
            )
    decoder = getattr(models[0], "decoder", None)
    if (
        not isinstance(decoder, TransformerDecoderBase)
        or decoder.cross_self_attention
        or any(getattr(layer, "encoder_attn", None) is None for layer in decoder.layers)
    ):
        name = type(models[0]).__name__
        raise ValueError(f"--continuous-batching serves transformers whose decoder attends to an encoder, got {name}")


@dataclass(frozen=True)
class Request:
    """One of fairseq's batches as its task hands it to a generator."""

    sample: dict
    prefix_tokens: Tensor | None = None
    bos_token: int | None = None

    def key(self) -> Hashable:
        """The same for two requests of the same sentences, in the same order and under the same conditions."""
        tensors = (self.sample.get("id"), self.sample["net_input"]["src_tokens"], self.prefix_tokens)
        return self.bos_token, *(None if each is None else (each.shape, _bytes(each)) for each in tensors)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().cpu().numpy().tobytes()


class RequestMaker:
    """Stands for a generator where a task is asked what it would hand to one."""

    def generate(self, models, sample, prefix_tokens=None, constraints=None, bos_token=None) -> Request:
        return Request(sample, prefix_tokens, bos_token)


@dataclass(frozen=True)
class Room:
    """How much the decoder may hold, by the rule that fairseq makes batches by; None: no limit of that kind."""

    sentences: int | None = None
    tokens: int | None = None

    def has(self, lengths: list[int]) -> bool:
        """Whether sentences whose sources have so many tokens may be there together; one always may."""
        if len(lengths) <= 1:
            return True
        if self.sentences is not None and len(lengths) > self.sentences:
            return False
        return self.tokens is None or len(lengths) * max(lengths) <= self.tokens


@dataclass
class Sentence:
    """On its way from the encoder to its hypotheses.

    source: (S, D) encoder output; prefix: tokens that are forced, padded to those of its batch; step: the next.
    """

    source: Tensor | None
    source_length: int
    max_len: int
    first_token: int
    prefix: list[int]
    step: int = 0
    hypotheses: list[dict[str, Tensor]] = field(default_factory=list)
    done: bool = False
