"""Continuous batching (`--continuous-batching`): waiting sentences take the place of finished ones in the decoder.

fairseq asks for the hypotheses of one batch after the other. Here the sentences of coming batches are encoded as
fairseq batched them, and enter the decoder as soon as there is room; what they came to is kept until fairseq asks.
The search is fairseq's beam search (`SequenceGenerator._generate`, `search.BeamSearch`) with a step per sentence.

Legend: N = sentences in the decoder (slots), B = beam size, C = candidates (2 * B), V = vocabulary, W = columns.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Hashable

import torch
from fairseq.search import BeamSearch
from fairseq.sequence_generator import SequenceGenerator
from torch import Tensor

from fairseq_moe_ext.serving.decoder_rows import DecoderRows
from fairseq_moe_ext.serving.requests import Request, Room, Sentence


class ContinuousGenerator(SequenceGenerator):
    """fairseq's beam search over a stream of sentences.

    look_ahead: the next Request that fairseq has not asked for yet; None after the last.
    """

    def __init__(self, models, tgt_dict, **options):
        super().__init__(models, tgt_dict, **options)
        if 2 * self.beam_size >= self.vocab_size:
            raise ValueError(f"--beam must be below half of the {self.vocab_size} words, got {self.beam_size}")
        if type(self.search) is not BeamSearch:
            name = type(self.search).__name__
            raise ValueError(f"--continuous-batching searches as fairseq's BeamSearch does, got the strategy {name}")
        self.room = Room()
        self.look_ahead: Callable[[], Request | None] = lambda: None
        self._encoded: dict[Hashable, deque[list[Sentence]]] = {}  # batches not asked for yet, by what they are
        self._waiting: deque[Sentence] = deque()
        self._live: list[Sentence] = []  # by slot
        self._rows = DecoderRows(self.model.single_model.decoder, self.beam_size)
        self._tokens: Tensor | None = None  # (N, B, W)
        self._scores: Tensor | None = None  # (N, B, W) cumulative, by step
        self._totals: Tensor | None = None  # (N, B) the last of them; -inf where a beam does not live yet
        self._ignored: Tensor | None = None  # (N, B) bool: beams whose hypothesis is final

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
            self._step()
        if not self._waiting and all(sentence.done for sentence in self._live):
            self._clear()
        return [_best_first(sentence.hypotheses) for sentence in batch]

    def _clear(self) -> None:
        """Nothing is under way: no caches."""
        self._live = []
        self._rows = DecoderRows(self.model.single_model.decoder, self.beam_size)
        self._tokens = self._scores = self._totals = self._ignored = None

    def _encode(self, request: Request) -> None:
        """Encode a batch; its sentences wait."""
        net_input = request.sample["net_input"]
        src_tokens = net_input["src_tokens"]
        max_len = min(int(self.max_len_a * src_tokens.size(1) + self.max_len_b), self.max_len - 1)
        if self.min_len > max_len:
            raise ValueError(f"--min-len must be at most the longest output allowed, {max_len}, got {self.min_len}")
        encoder_out = self.model.forward_encoder(net_input)[0]
        states, (padding,) = encoder_out["encoder_out"][0], encoder_out["encoder_padding_mask"]
        first = self.eos if request.bos_token is None else request.bos_token
        prefix = None if request.prefix_tokens is None else request.prefix_tokens.tolist()
        lengths = (~padding).sum(dim=1).tolist()
        batch = [
            Sentence(states[~padding[row], row], lengths[row], max_len, first, prefix[row] if prefix else [])
            for row in range(src_tokens.size(0))
        ]
        self._encoded.setdefault(request.key(), deque()).append(batch)
        self._waiting.extend(batch)

    def _admit(self) -> None:
        """Fill the room with waiting sentences; slots of sentences that are done are filled or given up."""
        free = [slot for slot, sentence in enumerate(self._live) if sentence.done]
        lengths = [sentence.source_length for sentence in self._live if not sentence.done]
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
        if len(free) > len(new):
            self._give_up(set(free[len(new) :]))
            free = free[: len(new)]
        if new:
            slots = free + list(range(len(self._live), len(self._live) + len(new) - len(free)))
            self._place(slots, new)

    def _give_up(self, slots: set[int]) -> None:
        kept = torch.tensor([slot for slot in range(len(self._live)) if slot not in slots], device=self._tokens.device)
        beams = torch.arange(self.beam_size, device=kept.device)
        self._live = [sentence for slot, sentence in enumerate(self._live) if slot not in slots]
        self._rows.advance((kept.unsqueeze(1) * self.beam_size + beams).view(-1), self._oldest())
        self._rows.keep(kept)
        for name in ("_tokens", "_scores", "_totals", "_ignored"):
            setattr(self, name, getattr(self, name)[kept])

    def _oldest(self) -> int:
        return max((sentence.step for sentence in self._live if not sentence.done), default=0)

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
        self._tokens[index] = self.pad
        firsts = torch.tensor([sentence.first_token for sentence in new], device=device)
        self._tokens[index, :, 0] = firsts.unsqueeze(1)
        self._totals[index] = -math.inf  # at the first step all beams are equal: only the first counts
        self._totals[index, 0] = 0.0
        self._ignored[index] = False
        for slot, sentence in zip(slots, new, strict=True):
            sentence.source = None
            self._live[slot : slot + 1] = [sentence]

    def _step(self) -> None:
        """One decode step of every slot."""
        slots, beams = self._totals.shape
        steps = torch.tensor([sentence.step for sentence in self._live], device=self._tokens.device)
        columns = steps.view(-1, 1, 1).expand(slots, beams, 1)
        last = self._tokens.gather(2, columns).view(-1, 1)
        with self._rows.at_steps(steps):
            encoder_outs, states = [self._rows.encoder_out], [self._rows.state]
            lprobs, _ = self.model.forward_decoder(last, encoder_outs, states, self.temperature)
        lprobs = self._constrain(lprobs.view(slots, beams, self.vocab_size))
        lprobs = (lprobs + self._totals.unsqueeze(2)).view(slots, -1)
        scores, indices = torch.topk(lprobs, k=2 * beams)  # (N, C)
        parents, words = torch.div(indices, self.vocab_size, rounding_mode="trunc"), indices.fmod(self.vocab_size)
        final = words.eq(self.eos) & scores.ne(-math.inf)
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
        for sentence in self._live:
            sentence.step += 1
        self._rows.advance(order, self._oldest())

    def _constrain(self, lprobs: Tensor) -> Tensor:
        """fairseq's rules for what may come next: lprobs (N, B, V), in place."""
        lprobs[lprobs != lprobs] = -math.inf
        lprobs[..., self.pad] = -math.inf
        lprobs[..., self.unk] -= self.unk_penalty
        at_end, too_short = [], []
        for slot, sentence in enumerate(self._live):
            if sentence.step >= sentence.max_len:
                at_end.append(slot)
            if sentence.step < len(sentence.prefix) and sentence.step < sentence.max_len:
                self._force(lprobs[slot], slot, sentence.prefix[sentence.step])
            elif sentence.step < self.min_len:
                too_short.append(slot)
        if at_end:
            ends = lprobs[at_end, :, self.eos]
            lprobs[at_end] = -math.inf
            lprobs[at_end, :, self.eos] = ends
        if too_short:
            lprobs[too_short, :, self.eos] = -math.inf
        return lprobs

    def _force(self, lprobs: Tensor, slot: int, token: int) -> None:
        """Only `token` may come next in a slot's lprobs (B, V); padding forces nothing."""
        if token == self.pad:
            return
        forced = lprobs[:, token].clone()
        lprobs.fill_(-math.inf)
        lprobs[:, token] = forced
        if token == self.eos and self._live[slot].step > 0:  # a prefix that ends: all beams are the first
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
        for row, slot in enumerate(ended):
            sentence = self._live[slot]
            if sentence.done or len(sentence.hypotheses) == self.beam_size:
                continue
            step = sentence.step
            hypothesis, cumulative = tokens[row, 1 : step + 2].clone(), history[row, : step + 1].clone()
            hypothesis[step], cumulative[step] = self.eos, end_scores[row]
            cumulative[1:] = cumulative[1:] - cumulative[:-1]
            score = end_scores[row]
            if self.normalize_scores:
                score = score / (step + 1) ** self.len_penalty
            sentence.hypotheses.append(
                {
                    "tokens": hypothesis,
                    "score": score,
                    "attention": torch.empty(0),
                    "alignment": torch.empty(0),
                    "positional_scores": cumulative,
                }
            )
        for slot in set(ended):
            sentence = self._live[slot]
            sentence.done |= len(sentence.hypotheses) == self.beam_size or sentence.step == sentence.max_len
        if any(sentence.step == sentence.max_len and not sentence.done for sentence in self._live):
            raise RuntimeError("a sentence came to its longest output without a hypothesis: its scores are no numbers")


def _best_first(hypotheses: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
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
