"""Continuous batching (`--continuous-batching`): waiting sentences take the place of finished ones in the decoder.

fairseq asks for the hypotheses of one batch after the other. Here the sentences of coming batches are encoded as
fairseq batched them, and enter the decoder as soon as there is room; what they came to is kept until fairseq asks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable

import torch
from fairseq.search import BeamSearch
from fairseq.sequence_generator import SequenceGenerator

from fairseq_moe_ext.decoding.beam_steps import BeamSteps, best_first
from fairseq_moe_ext.decoding.requests import Request, Room, SearchOptions, Sentence, longest_output


class ContinuousGenerator(SequenceGenerator):
    """fairseq's beam search over a stream of sentences.

    look_ahead: the next Request that fairseq has not asked for yet; None after the last.
    """

    def __init__(self, models, tgt_dict, **options):
        super().__init__(models, tgt_dict, **options)
        if type(self.search) is not BeamSearch:
            name = type(self.search).__name__
            raise ValueError(f"--continuous-batching searches as fairseq's BeamSearch does, got the strategy {name}")
        self.room = Room()
        self.look_ahead: Callable[[], Request | None] = lambda: None
        self._encoded: dict[Hashable, deque[list[Sentence]]] = {}  # batches not asked for yet, by what they are
        self._waiting: deque[Sentence] = deque()
        self._steps = BeamSteps(self, self.beam_size, lambda rows: self._hypotheses_end(rows))

    @torch.no_grad()
    def generate(self, models, sample, prefix_tokens=None, constraints=None, bos_token=None):
        """The hypotheses of this batch, best first; other batches' sentences are decoded beside its own."""
        request = Request(sample, prefix_tokens, bos_token)
        if (key := request.key()) not in self._encoded:
            self._encode(request)
        batch = self._encoded[key].popleft()
        if not self._encoded[key]:
            del self._encoded[key]
        while not all(sentence.done for sentence in batch):
            self._admit()
            self._steps.step()
        if not self._waiting and self._steps.is_empty:
            self._steps.clear()
        if not all(sentence.hypotheses for sentence in batch):
            raise RuntimeError("a sentence came to its longest output without a hypothesis: its scores are no numbers")
        return [best_first(sentence.hypotheses) for sentence in batch]

    def _hypotheses_end(self, rows: list[int]) -> None:
        """As BeamSteps tells it; for those who count them."""

    def _encode(self, request: Request) -> None:
        """Encode a batch; its sentences wait."""
        net_input = request.sample["net_input"]
        src_tokens = net_input["src_tokens"]
        max_len = longest_output(self.max_len_a, self.max_len_b, src_tokens.size(1), self.max_len, self.min_len)
        options = SearchOptions(
            self.min_len, self.normalize_scores, self.len_penalty, self.unk_penalty, self.temperature
        )
        encoder_out = self.model.forward_encoder(net_input)[0]
        states, (padding,) = encoder_out["encoder_out"][0], encoder_out["encoder_padding_mask"]
        first = self.eos if request.bos_token is None else request.bos_token
        prefix = None if request.prefix_tokens is None else request.prefix_tokens.tolist()
        lengths = (~padding).sum(dim=1).tolist()
        batch = [
            Sentence(states[~padding[row], row], lengths[row], max_len, first, prefix[row] if prefix else [], options)
            for row in range(src_tokens.size(0))
        ]
        self._encoded.setdefault(request.key(), deque()).append(batch)
        self._waiting.extend(batch)

    def _admit(self) -> None:
        """Fill the room with waiting sentences."""
        lengths = self._steps.source_lengths
        new: list[Sentence] = []
        while True:
            if not self._waiting:
                request = self.look_ahead() if self.room.has([*lengths, 1]) else None
                if request is None:
                    break
                self._encode(request)
            if not self.room.has([*lengths, self._waiting[0].source_length]):
                break
            new.append(self._waiting.popleft())
            lengths.append(new[-1].source_length)
        self._steps.admit(new)
