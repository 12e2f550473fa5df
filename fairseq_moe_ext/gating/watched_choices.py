"""What a gate chooses, counted by language, and a sample of what it chose by.

A token is drawn into the sample by a number that depends on its batch and its place there alone, so that the layers of
a stack, and any number of ranks, draw the same tokens.

Legend: T = tokens of a call, E = experts, K = choices per token, S = sampled tokens, D = model dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from fairseq_moe_ext.gating.routing import Gate, Routing
from fairseq_moe_ext.recording import MOST_SAMPLED, Choices, Sample

TOKENS_AT_ONCE = 512  # that wait: a few tokens cost as much as many


@dataclass(frozen=True, eq=False)
class StackPass:
    """One pass of a stack, as its gates' tokens (T,) are told of.

    language: its number. batch: of all ranks'. first: how many tokens of its batch this stack had before. live: (T,)
    bool, False where nothing goes on from a token; None: everywhere. ends: (T,) bool, where the end of sentence is
    emitted; None: nowhere that is known yet.
    """

    language: int
    batch: int
    first: int
    tokens: int
    live: Tensor | None = None
    ends: Tensor | None = None

    @cached_property
    def keys(self) -> np.ndarray:
        """(T,) uint64, by which tokens are drawn."""
        start = np.uint64((self.batch << 32) + self.first)
        return _mixed(np.arange(self.tokens, dtype=np.uint64) + start)


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """Each number's own random one: splitmix64."""
    with np.errstate(over="ignore"):
        found = (numbers + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        found = (found ^ (found >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        found = (found ^ (found >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return found ^ (found >> np.uint64(31))


class WatchedChoices:
    """Watches one gate; `begin` says which pass its next call belongs to."""

    def __init__(self, gate: Gate):
        self._num_experts, model_dim = gate.wg.weight.shape
        self._counts: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}  # by language
        self._sample = Sample(
            np.zeros(0, np.uint64),
            np.zeros((0, model_dim), np.float16),
            np.zeros((0, gate.num_choices), np.int32),
            np.zeros(0, np.int32),
        )
        self._pass: StackPass | None = None
        self._waiting: list[tuple[StackPass, Tensor, Routing]] = []
        self._num_waiting = 0  # tokens, of passes that are done
        self._last: tuple[int, Tensor] | None = None  # language and first choices (T,) of the last call
        gate.register_forward_hook(self._take)

    def begin(self, stack_pass: StackPass | None) -> None:
        """None: calls belong to no pass, and are not counted."""
        self._pass = stack_pass

    def drop(self) -> None:
        """The pass under way broke off."""
        self._waiting = [each for each in self._waiting if each[0] is not self._pass]
        self._pass = self._last = None

    def end(self) -> None:
        """The pass under way is done."""
        self._num_waiting += 0 if self._pass is None else self._pass.tokens
        self._pass = None
        if self._num_waiting >= TOKENS_AT_ONCE:
            self._take_in()

    def hypotheses_end(self, tokens: Sequence[int] | Tensor) -> None:
        """After these tokens of the last pass, by number, the end of sentence was chosen."""
        if self._last is not None:
            language, first = self._last
            chosen = first[torch.as_tensor(tokens, device=first.device)].cpu().numpy()
            self._of(language)[2][:] += np.bincount(chosen, minlength=self._num_experts)

    def result(self, languages: int) -> tuple[Choices, Sample]:
        """So far."""
        self._take_in()
        dtypes = (np.int64, np.float64, np.int64)
        first, confidence, ends = (np.zeros((languages, self._num_experts), dtype) for dtype in dtypes)
        for language, counts in self._counts.items():
            first[language], confidence[language], ends[language] = counts
        return Choices(first, confidence, ends), self._sample

    @torch.no_grad()
    def _take(self, _gate: torch.nn.Module, inputs: tuple, routing: Routing) -> None:
        """The gate's forward hook."""
        if self._pass is not None:
            self._waiting.append((self._pass, inputs[0].detach(), routing))
            self._last = self._pass.language, routing.expert_ids[:, 0]

    def _of(self, language: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if language not in self._counts:
            dtypes = (np.int64, np.float64, np.int64)
            first, confidence, ends = (np.zeros(self._num_experts, dtype) for dtype in dtypes)
            self._counts[language] = first, confidence, ends
        return self._counts[language]

    @torch.no_grad()
    def _take_in(self) -> None:
        waiting, self._waiting, self._num_waiting = self._waiting, [], 0
        for language in dict.fromkeys(stack_pass.language for stack_pass, *_ in waiting):
            self._count(language, [each for each in waiting if each[0].language == language])

    def _count(self, language: int, calls: list[tuple[StackPass, Tensor, Routing]]) -> None:
        chosen = torch.cat([routing.expert_ids for *_, routing in calls])  # (T, K)
        real = torch.cat([
            routing.kept[:, 0] if stack_pass.live is None else routing.kept[:, 0] & stack_pass.live
            for stack_pass, _, routing in calls
        ])
        gained = torch.cat([routing.probabilities.gather(1, routing.expert_ids[:, :1])[:, 0] for *_, routing in calls])
        experts, counted = chosen.cpu().numpy(), real.cpu().numpy()
        first, confidence, ends = self._of(language)
        ours = experts[counted, 0]
        first += np.bincount(ours, minlength=self._num_experts)
        confidence += np.bincount(ours, gained.double().cpu().numpy()[counted], self._num_experts)
        if any(stack_pass.ends is not None for stack_pass, *_ in calls):
            ending = torch.cat([
                torch.zeros_like(routing.kept[:, 0]) if stack_pass.ends is None else stack_pass.ends
                for stack_pass, _, routing in calls
            ])
            ends += np.bincount(experts[ending.cpu().numpy() & counted, 0], minlength=self._num_experts)
        self._draw(language, calls, experts, counted)

    def _draw(
        self,
        language: int,
        calls: list[tuple[StackPass, Tensor, Routing]],
        experts: np.ndarray,
        counted: np.ndarray,
    ) -> None:
        keys = np.concatenate([stack_pass.keys for stack_pass, *_ in calls])
        full = len(self._sample.keys) == MOST_SAMPLED
        drawn = np.flatnonzero(counted & (keys < self._sample.keys[-1]) if full else counted)
        if len(drawn) > MOST_SAMPLED:
            drawn = drawn[np.argpartition(keys[drawn], MOST_SAMPLED - 1)[:MOST_SAMPLED]]
        if len(drawn):
            tokens = torch.cat([inputs for _, inputs, _ in calls])
            inputs = tokens[torch.from_numpy(drawn).to(tokens.device)].half().cpu().numpy()
            languages = np.full(len(drawn), language, np.int32)
            new = Sample(keys[drawn], inputs, experts[drawn].astype(np.int32), languages)
            self._sample = self._sample.plus(new)
