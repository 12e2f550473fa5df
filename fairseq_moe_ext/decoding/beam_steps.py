"""Sentences in the decoder under beam search, each at a step of its own; they come and go between steps.

The search is fairseq's (`SequenceGenerator._generate`, `search.BeamSearch`) with a step, a longest output and options
per sentence; what all share is the beam size.

Legend: N = sentences in the decoder (slots), B = beam size, C = candidates (2 * B), V = vocabulary, W = columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from fairseq.sequence_generator import SequenceGenerator
from torch import Tensor

from fairseq_moe_ext.decoding.decoder_rows import DecoderRows
from fairseq_moe_ext.decoding.requests import Sentence, check_beam


class BeamSteps:
    """Decodes `live` sentences with the model of `generator`, of whose options none but its special words is read.

    A sentence is done when it has B hypotheses or came to its longest output; without any where its scores are no
    numbers. Whoever sets `done` takes the sentence out at the next `admit`.

    tell: at every step called with the rows, slot * B + beam, whose hypotheses end there.
    """

    def __init__(
        self, generator: SequenceGenerator, beam_size: int, tell: Callable[[list[int]], None] = lambda rows: None
    ):
        check_beam(beam_size, generator.vocab_size)
        self.beam_size = beam_size
        self.live: list[Sentence] = []  # by slot
        self._generator, self._tell = generator, tell
        self._vocab_size = generator.vocab_size
        self.clear()

    def clear(self) -> None:
        """Nothing is under way: no caches."""
        self.live = []
        self._rows = DecoderRows(self._generator.model.single_model.decoder, self.beam_size)
        self._tokens: Tensor | None = None  # (N, B, W)
        self._scores: Tensor | None = None  # (N, B, W) cumulative, by step
        self._totals: Tensor | None = None  # (N, B) the last of them; -inf where a beam does not live yet
        self._ignored: Tensor | None = None  # (N, B) bool: beams whose hypothesis is final

    @property
    def is_empty(self) -> bool:
        """Whether no sentence is under way."""
        return all(sentence.done for sentence in self.live)

    @property
    def source_lengths(self) -> list[int]:
        """Of the sentences under way, in tokens."""
        return [sentence.source_length for sentence in self.live if not sentence.done]

    def admit(self, new: list[Sentence]) -> None:
        """`new` sentences begin; slots of those that are done are filled or given up."""
        free = [slot for slot, sentence in enumerate(self.live) if sentence.done]
        if len(free) > len(new):
            self._give_up(set(free[len(new) :]))
            free = free[: len(new)]
        if new:
            slots = free + list(range(len(self.live), len(self.live) + len(new) - len(free)))
            self._place(slots, new)

    def _give_up(self, slots: set[int]) -> None:
        kept = torch.tensor([slot for slot in range(len(self.live)) if slot not in slots], device=self._tokens.device)
        if not len(kept):
            self.clear()
            return
        beams = torch.arange(self.beam_size, device=kept.device)
        self.live = [sentence for slot, sentence in enumerate(self.live) if slot not in slots]
        self._rows.advance((kept.unsqueeze(1) * self.beam_size + beams).view(-1), self._oldest())
        self._rows.keep(kept)
        for name in ("_tokens", "_scores", "_totals", "_ignored"):
            setattr(self, name, getattr(self, name)[kept])

    def _oldest(self) -> int:
        return max((sentence.step for sentence in self.live if not sentence.done), default=0)

    def _place(self, slots: list[int], new: list[Sentence]) -> None:
        self._rows.admit(slots, [sentence.source for sentence in new])
        device = new[0].source.device
        total, width = self._rows.num_slots, max(sentence.max_len for sentence in new) + 2
        if self._tokens is not None:
            width = max(width, self._tokens.size(2))
        more = ((self.beam_size, width), torch.int64), ((self.beam_size, width), torch.float32)
        more += ((self.beam_size,), torch.float32), ((self.beam_size,), torch.bool)
        for name, (shape, dtype) in zip(("_tokens", "_scores", "_totals", "_ignored"), more, strict=True):
            setattr(self, name, _grown(getattr(self, name), (total, *shape), dtype, device))
        index = torch.tensor(slots, device=device)
        self._tokens[index] = self._generator.pad
        firsts = torch.tensor([sentence.first_token for sentence in new], device=device)
        self._tokens[index, :, 0] = firsts.unsqueeze(1)
        self._totals[index] = -math.inf  # at the first step all beams are equal: only the first counts
        self._totals[index, 0] = 0.0
        self._ignored[index] = False
        for slot, sentence in zip(slots, new, strict=True):
            sentence.source = None
            self.live[slot : slot + 1] = [sentence]

    def step(self) -> None:
        """One decode step of every slot."""
        slots, beams = self._totals.shape
        steps = torch.tensor([sentence.step for sentence in self.live], device=self._tokens.device)
        columns = steps.view(-1, 1, 1).expand(slots, beams, 1)
        last = self._tokens.gather(2, columns).view(-1, 1)
        with self._rows.at_steps(steps):
            encoder_outs, states = [self._rows.encoder_out], [self._rows.state]
            temperature = self._temperature()
            lprobs, _ = self._generator.model.forward_decoder(last, encoder_outs, states, temperature)
        lprobs = self._constrain(lprobs.view(slots, beams, self._vocab_size))
        lprobs = (lprobs + self._totals.unsqueeze(2)).view(slots, -1)
        scores, indices = torch.topk(lprobs, k=2 * beams)  # (N, C)
        parents, words = torch.div(indices, self._vocab_size, rounding_mode="trunc"), indices.fmod(self._vocab_size)
        final = words.eq(self._generator.eos) & scores.ne(-math.inf)
        final[:, :beams] &= ~self._ignored
        self._finalize(final[:, :beams], parents, scores)
        # the best candidates that go on: the first B of C that neither end nor belong to a beam that has ended
        final[:, :beams] |= self._ignored
        ranks = torch.arange(2 * beams, device=final.device)
        ranks, chosen = torch.topk(final * (2 * beams) + ranks, k=beams, dim=1, largest=False)
        self._ignored = ranks.ge(2 * beams)
        parents, words = parents.gather(1, chosen), words.gather(1, chosen)
        self._totals = scores.gather(1, chosen)
        order = (torch.arange(slots, device=parents.device).unsqueeze(1) * beams + parents).view(-1)
        self._tokens = self._tokens.view(slots * beams, -1)[order].view(slots, beams, -1)
        self._tokens.scatter_(2, columns + 1, words.unsqueeze(2))
        self._scores = self._scores.view(slots * beams, -1)[order].view(slots, beams, -1)
        self._scores.scatter_(2, columns, self._totals.unsqueeze(2))
        for sentence in self.live:
            sentence.step += 1
        self._rows.advance(order, self._oldest())

    def _temperature(self) -> float | Tensor:
        """What the logits (N * B, 1, V) are divided by."""
        temperatures = [sentence.options.temperature for sentence in self.live]
        if len(set(temperatures)) == 1:
            return temperatures[0]
        each = torch.tensor(temperatures, device=self._tokens.device)
        return each.repeat_interleave(self.beam_size).view(-1, 1, 1)

    def _constrain(self, lprobs: Tensor) -> Tensor:
        """fairseq's rules for what may come next: lprobs (N, B, V), in place."""
        generator = self._generator
        lprobs[lprobs != lprobs] = -math.inf
        lprobs[..., generator.pad] = -math.inf
        penalties = torch.tensor([sentence.options.unk_penalty for sentence in self.live], device=lprobs.device)
        lprobs[..., generator.unk] -= penalties.unsqueeze(1)
        at_end, too_short = [], []
        for slot, sentence in enumerate(self.live):
            if sentence.step >= sentence.max_len:
                at_end.append(slot)
            if sentence.step < len(sentence.prefix) and sentence.step < sentence.max_len:
                self._force(lprobs[slot], slot, sentence.prefix[sentence.step])
            elif sentence.step < sentence.options.min_len:
                too_short.append(slot)
        if at_end:
            ends = lprobs[at_end, :, generator.eos]
            lprobs[at_end] = -math.inf
            lprobs[at_end, :, generator.eos] = ends
        if too_short:
            lprobs[too_short, :, generator.eos] = -math.inf
        return lprobs

    def _force(self, lprobs: Tensor, slot: int, token: int) -> None:
        """Only `token` may come next in a slot's lprobs (B, V); padding forces nothing."""
        if token == self._generator.pad:
            return
        forced = lprobs[:, token].clone()
        lprobs.fill_(-math.inf)
        lprobs[:, token] = forced
        if token == self._generator.eos and self.live[slot].step > 0:  # a prefix that ends: all beams are the first
            for tensor in (lprobs, self._tokens[slot], self._scores[slot], self._totals[slot]):
                tensor.copy_(tensor[:1].clone().expand_as(tensor))

    def _finalize(self, final: Tensor, parents: Tensor, scores: Tensor) -> None:
        """Take down hypotheses that end: final (N, B) bool of the best candidates, parents and scores (N, C)."""
        slots, places = final.nonzero(as_tuple=True)
        ended = slots.tolist()
        if ended:
            beams = parents[slots, places]
            tokens, history = self._tokens[slots, beams].cpu(), self._scores[slots, beams].cpu()
            end_scores = scores[slots, places].cpu()
            rows, kept = (slots * self.beam_size + beams).tolist(), []
        for row, slot in enumerate(ended):
            sentence = self.live[slot]
            if sentence.done or len(sentence.hypotheses) == self.beam_size:
                continue
            step = sentence.step
            hypothesis, cumulative = tokens[row, 1 : step + 2].clone(), history[row, : step + 1].clone()
            hypothesis[step], cumulative[step] = self._generator.eos, end_scores[row]
            cumulative[1:] = cumulative[1:] - cumulative[:-1]
            score = end_scores[row]
            if sentence.options.normalize_scores:
                score = score / (step + 1) ** sentence.options.len_penalty
            sentence.hypotheses.append(
                {
                    "tokens": hypothesis,
                    "score": score,
                    "attention": torch.empty(0),
                    "alignment": torch.empty(0),
                    "positional_scores": cumulative,
                }
            )
            kept.append(rows[row])
        if ended:
            self._tell(kept)
        for sentence in self.live:
            sentence.done |= len(sentence.hypotheses) == self.beam_size or sentence.step == sentence.max_len


def best_first(hypotheses: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """A sentence's hypotheses as fairseq gives them out."""
    scores = torch.tensor([float(each["score"]) for each in hypotheses])
    return [hypotheses[place] for place in torch.sort(scores, descending=True)[1]]


def _grown(old: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`old` in the corner of a tensor of `shape`; itself where it has it."""
    if old is not None and old.shape == shape:
        return old
    grown = torch.zeros(shape, dtype=dtype, device=device)
    if old is not None:
        grown[tuple(slice(size) for size in old.shape)] = old
    return grown
