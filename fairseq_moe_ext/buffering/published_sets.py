"""Sets of experts per language as they were published for NLLB-54B: a JSON object, language -> expert numbers.

A number counts the experts of all MoE layers, layer by layer, the encoder's first; an encoder's experts are for a
source language, a decoder's for a target language. Source: github.com/naver/nllb-pruning, `experts.json`, of
"Memory-efficient NLLB-200" (arXiv 2212.09811).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from itertools import accumulate, pairwise
from typing import Any

from fairseq_moe_ext.bounded_json import read_json
from fairseq_moe_ext.buffering.profile import is_name, is_whole

# language -> layer -> the numbers of its experts in that layer, rising
Sets = dict[str, dict[str, tuple[int, ...]]]


def load_published_sets(path: str | os.PathLike, num_experts: Mapping[str, int]) -> Sets:
    """Read such a file for a model of the layers `num_experts`: name -> E, those of a stack in their order.

    A language may have no expert of a layer. ValueError names the file and what is wrong in it.
    """
    try:
        return parse_published_sets(read_json(path), num_experts)
    except (OSError, ValueError) as error:
        said = getattr(error, "strerror", None) or error
        raise ValueError(f"{path}: not sets of experts by language (.json): {said}") from error


def check_published_sets(content: Any) -> None:
    """ValueError where the file's JSON is no such object, for whatever model."""
    if not isinstance(content, dict) or not content or not all(map(is_name, content)):
        raise ValueError("it must be an object of expert numbers by language")
    for language, numbers in content.items():
        if not isinstance(numbers, list) or not numbers or not all(map(is_whole, numbers)):
            raise ValueError(f"{language} must have a list of expert numbers, whole ones from 0 on")
        if any(later <= earlier for earlier, later in pairwise(numbers)):
            raise ValueError(f"{language} must have rising expert numbers, each once")


def parse_published_sets(content: Any, num_experts: Mapping[str, int]) -> Sets:
    """What the file's JSON says of a model; ValueError."""
    check_published_sets(content)
    # a stable sort: layers of one side keep their order
    names = sorted(num_experts, key=lambda name: not name.startswith("encoder."))
    ends = list(accumulate(num_experts[name] for name in names))
    for language, numbers in content.items():
        if numbers[-1] >= ends[-1]:
            raise ValueError(
                f"{language} must have expert numbers below the {ends[-1]} of the model's {len(names)} MoE layers, "
                f"got {numbers[-1]}"
            )
    starts = [0, *ends[:-1]]
    return {
        language: {
            name: tuple(number - start for number in numbers if start <= number < end)
            for name, start, end in zip(names, starts, ends, strict=True)
        }
        for language, numbers in content.items()
    }
