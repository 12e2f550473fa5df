"""A decoder's incremental state in which every sentence is at a step of its own.

fairseq's decoders expect all rows at one step. Here the cached keys and values of self-attention are aligned at the
newest, and what a younger sentence lacks before them is masked as padding; positions are given per row. Encoder keys
and values lie once per sentence, whatever the beam; a new sentence overwrites a finished one's in place.

Legend: N = sentences (slots), B = beam size, L = cached steps, S = source positions, H = heads, D = model dim.
"""

from __future__ import annotations

from contextlib import contextmanager

import torch
import torch.nn.functional as F
from fairseq.modules import LearnedPositionalEmbedding
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

KEY, VALUE, MASK = "prev_key", "prev_value", "prev_key_padding_mask"  # fairseq's names


class DecoderRows:
    """The state of one of fairseq's transformer decoders; row n * B + b is beam b of slot n.

    `state` and `encoder_out` are what the decoder's forward takes besides the rows' last tokens (N * B, 1).
    """

    def __init__(self, decoder: nn.Module, beam_size: int):
        self._decoder, self._beam_size = decoder, beam_size
        self._positions: Tensor | None = None
        self.state: dict[str, dict[str, Tensor | None]] = {}
        self.num_slots = 0

    @property
    def encoder_out(self) -> dict[str, list[Tensor]]:
        """Stands for the encoder's output, whose keys and values are in the state already."""
        like, dim = next(self._decoder.parameters()), self._decoder.layers[0].encoder_attn.kdim
        return {"encoder_out": [like.new_empty(1, self.num_slots, dim)], "encoder_padding_mask": []}

    @contextmanager
    def at_steps(self, steps: Tensor):
        """In this context the decoder's rows are at `steps` (N,), counted from 0."""
        positions = self._decoder.padding_idx + 1 + steps
        self._positions = positions.repeat_interleave(self._beam_size).unsqueeze(1)
        embed = self._decoder.embed_positions
        hook = None if embed is None else embed.register_forward_hook(self._embed_own_positions)
        try:
            yield
        finally:
            if hook is not None:
                hook.remove()  # it would keep these rows for as long as the decoder lives
            self._positions = None

    def _embed_own_positions(self, module: nn.Module, _inputs, output: Tensor) -> Tensor:
        if isinstance(module, LearnedPositionalEmbedding):
            return F.embedding(self._positions, module.weight)
        return module.weights[self._positions]

    def advance(self, order: Tensor, steps: int) -> None:
        """After a decode step row i goes on as row order[i] was; rows that are missing in `order` are gone.

        order (rows,) int64, whole slots; steps: those that the oldest of them has cached, the rest is cut off.
        """
        for layer in self._decoder.layers:
            cache = layer.self_attn._get_input_buffer(self.state)
            for name, dim in ((KEY, 2), (VALUE, 2), (MASK, 1)):
                tensor = cache.get(name)
                if tensor is not None:
                    tensor = tensor.narrow(dim, tensor.size(dim) - steps, steps)
                    cache[name] = tensor.index_select(0, order)

    def keep(self, slots: Tensor) -> None:
        """Of the encoder's keys and values keep those of `slots` (n,) int64, in this order."""
        for layer in self._decoder.layers:
            cache = layer.encoder_attn._get_input_buffer(self.state)
            for name, tensor in cache.items():
                cache[name] = tensor.index_select(0, slots)
        self.num_slots = slots.numel()

    def admit(self, slots: list[int], sources: list[Tensor]) -> None:
        """New sentences, at step 0, in `slots`: over what is there, or right after the last.

        sources: per sentence its encoder output (S, D) without padding.
        """
        lengths = [source.size(0) for source in sources]
        flat = torch.cat(sources)
        index = torch.tensor(slots, device=flat.device)
        total = max(self.num_slots, max(slots) + 1)
        mask = torch.arange(max(lengths), device=flat.device) >= torch.tensor(lengths, device=flat.device).unsqueeze(1)
        for layer in self._decoder.layers:
            attention = layer.encoder_attn
            cache = attention._get_input_buffer(self.state)
            new = {MASK: mask}
            for name, project in ((KEY, attention.k_proj), (VALUE, attention.v_proj)):
                padded = pad_sequence(project(flat).split(lengths), batch_first=True)
                new[name] = padded.unflatten(2, (attention.num_heads, -1)).transpose(1, 2)
            for name, tensor in new.items():
                cache[name] = _place(cache.get(name), index, tensor, total, {KEY: 2, VALUE: 2, MASK: 1}[name])
            attention._set_input_buffer(self.state, cache)
            self._forget(layer.self_attn, index, total)
        self.num_slots = total

    def _forget(self, attention: nn.Module, slots: Tensor, total: int) -> None:
        """The rows of `slots` have nothing cached; there are `total` slots from here on."""
        cache = attention._get_input_buffer(self.state)
        if cache.get(KEY) is None or cache[KEY].size(2) == 0:
            cache.clear()
            return
        rows, cached = cache[KEY].size(0), cache[KEY].size(2)
        more = total * self._beam_size - rows
        mask = cache.get(MASK)
        if mask is None:
            mask = cache[KEY].new_zeros(rows, cached, dtype=torch.float32)
        if more:
            for name in (KEY, VALUE):
                cache[name] = torch.cat((cache[name], cache[name].new_zeros(more, *cache[name].shape[1:])))
            mask = torch.cat((mask, mask.new_zeros(more, cached)))
        mask.view(total, self._beam_size, cached)[slots] = 1
        cache[MASK] = mask
        for name in (KEY, VALUE):  # a weight of 0 does not keep out what is no number
            cache[name].view(total, self._beam_size, *cache[name].shape[1:])[slots] = 0


def _place(old: Tensor | None, slots: Tensor, new: Tensor, total: int, length_dim: int) -> Tensor:
    """`new` (n, ...) at `slots` (n,) of `old` (N, ...), in place where it fits; what is longer is padded at its end.

    A bool tensor is a padding mask: padded with True.
    """
    fill = new.dtype == torch.bool
    if old is None:
        old = new.new_full((0, *new.shape[1:]), fill)
    length = max(old.size(length_dim), new.size(length_dim))
    if total > old.size(0) or length > old.size(length_dim):
        shape = [total, *old.shape[1:]]
        shape[length_dim] = length
        grown = old.new_full(shape, fill)
        grown[: old.size(0)].narrow(length_dim, 0, old.size(length_dim)).copy_(old)
        old = grown
    if new.size(length_dim) < length:
        shape = list(new.shape)
        shape[length_dim] = length
        padded = new.new_full(shape, fill)
        padded.narrow(length_dim, 0, new.size(length_dim)).copy_(new)
        new = padded
    old[slots] = new
    return old
