"""What continuous batching is asked for: batches, room for their sentences, each on its way; and what it refuses."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fairseq.models.transformer import TransformerDecoderBase
from torch import Tensor

from fairseq_moe_ext.option_names import as_option

# options of generation under which a sentence's search is not its own, or that this search does not have
NOT_OF_ONE_SENTENCE = {
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
    for name, without in NOT_OF_ONE_SENTENCE.items():
        value = getattr(generation, name, without)
        if value not in (without, False, None):
            raise ValueError(f"--continuous-batching goes without {as_option(name)}, got {value}")
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


def check_gating(flags: Any) -> None:
    """Raise ValueError where a sentence's result depends on who is in its encoder pass, by a task's `flags`."""
    rule = "an engine needs results that do not depend on who shares a pass"
    fraction = getattr(flags, "moe_eval_capacity_token_fraction", None)
    if str(getattr(flags, "moe_gating", "dynamic")) == "static" and (fraction is None or fraction < 1):
        got = "the checkpoint's" if fraction is None else fraction
        raise ValueError(f"{rule}: moe_gating static must have moe_eval_capacity_token_fraction 1.0, got {got}")
    factor = getattr(flags, "moe_capacity_factor", None)
    if factor is not None:
        raise ValueError(f"{rule}: moe_capacity_factor must not be given, got {factor}")


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
        """Keep the arguments in place of generating; `models` and `constraints` are not needed."""
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


@dataclass(frozen=True)
class SearchOptions:
    """What a sentence's search may have for itself; fairseq's generator explains them under the same names."""

    min_len: int = 1
    normalize_scores: bool = True
    len_penalty: float = 1.0
    unk_penalty: float = 0.0
    temperature: float = 1.0


def check_beam(beam_size: int, vocab_size: int) -> None:
    """ValueError where a beam's candidates, twice as many, are not among the words."""
    if 2 * beam_size >= vocab_size:
        raise ValueError(f"--beam must be below half of the {vocab_size} words, got {beam_size}")


def longest_output(max_len_a: float, max_len_b: int, source_length: int, positions: int, min_len: int) -> int:
    """Most tokens of an output without its end, by fairseq's rule; `positions` are the decoder's.

    ValueError where `min_len` asks for more.
    """
    longest = min(int(max_len_a * source_length + max_len_b), positions - 1)
    if min_len > longest:
        raise ValueError(f"--min-len must be at most the longest output allowed, {longest}, got {min_len}")
    return longest


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
    options: SearchOptions = SearchOptions()
    step: int = 0
    hypotheses: list[dict[str, Tensor]] = field(default_factory=list)
    done: bool = False
