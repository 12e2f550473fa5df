"""What ranks send to rank 0: of any size, in chunks, received in the order in which each rank sent it.

Results are packed flat: a description in JSON, then the tensors' bytes. Nothing in it is executed.
"""

from __future__ import annotations

import json
from collections import deque
from typing import Any

import torch
from torch import Tensor
from torch.distributed import Work

from fairseq_moe_ext.ranks.process_group import RankGroup

CHUNK = 4 << 20  # bytes that travel at a time
_ALIGNMENT = 8  # of every tensor's bytes
_MARK = ""  # the one key of what is no JSON by itself: a tensor's number, a tuple's items
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}


class Outbox:
    """A rank's end: messages leave while it goes on; each is kept until rank 0 has it."""

    def __init__(self, group: RankGroup):
        self._group = group
        self._under_way: deque[tuple[int | None, list[Work], list[Tensor]]] = deque()

    def send(self, content: bytes, number: int | None = None) -> None:
        """Begin to send; number: by which `let_go` knows it. ExchangeError where rank 0 cannot be reached."""
        parts = [torch.tensor([len(content)])]
        if content:
            parts += torch.frombuffer(bytearray(content), dtype=torch.uint8).split(CHUNK)
        with self._group.naming_the_fault():
            works = [self._group.send(part, 0) for part in parts]
        self._under_way.append((number, works, parts))

    def let_go(self, before: int) -> None:
        """Forget messages of lower numbers, which rank 0 has received."""
        while self._under_way and self._under_way[0][0] is not None and self._under_way[0][0] < before:
            self._wait_for_first()

    def wait(self) -> None:
        """Until rank 0 has everything; ExchangeError where it cannot be reached."""
        while self._under_way:
            self._wait_for_first()

    def clear(self) -> None:
        """Forget what rank 0 does not receive any more."""
        self._under_way.clear()

    def _wait_for_first(self) -> None:
        _, works, _ = self._under_way.popleft()
        with self._group.naming_the_fault():
            for work in works:
                work.wait()


def receive(group: RankGroup, rank: int) -> bytearray:
    """The next message of `rank`; ExchangeError where it ends before."""
    size = torch.empty(1, dtype=torch.int64)
    with group.naming_the_fault():
        group.receive(size, rank)
        content = bytearray(int(size))
        if content:
            for chunk in torch.frombuffer(content, dtype=torch.uint8).split(CHUNK):
                group.receive(chunk, rank)
    return content


def pack(tree: Any) -> bytes:
    """tree: dicts, lists and tuples of tensors, numbers, strings and None.

    >>> unpack(bytearray(pack([{"tokens": torch.tensor([4, 2]), "alignment": [(0, 1)]}])))
    [{'tokens': tensor([4, 2]), 'alignment': [(0, 1)]}]
    """
    tensors: list[Tensor] = []
    described = _describe(tree, tensors)
    kinds = [[str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for tensor in tensors]
    header = json.dumps([described, kinds]).encode()
    parts = [len(header).to_bytes(_ALIGNMENT, "little"), header]
    parts += [tensor.reshape(-1).view(torch.uint8).numpy().tobytes() for tensor in tensors]
    return b"".join(part + bytes(-len(part) % _ALIGNMENT) for part in parts)


def unpack(content: bytearray) -> Any:
    """What was packed; its tensors, on the CPU, share the memory of `content`."""
    start = _ALIGNMENT + int.from_bytes(content[:_ALIGNMENT], "little")
    described, kinds = json.loads(content[_ALIGNMENT:start])
    tensors = []
    for name, shape in kinds:
        start += -start % _ALIGNMENT
        dtype, count = _DTYPES[name], torch.Size(shape).numel()
        if count:
            tensors.append(torch.frombuffer(content, dtype=dtype, count=count, offset=start).view(shape))
        else:
            tensors.append(torch.empty(shape, dtype=dtype))
        start += count * dtype.itemsize
    return _restore(described, tensors)


def _describe(node: Any, tensors: list[Tensor]) -> Any:
    """`node` as JSON, its tensors appended to `tensors`."""
    if isinstance(node, Tensor):
        tensors.append(node.detach().cpu().contiguous())
        return {_MARK: len(tensors) - 1}
    if isinstance(node, tuple):
        return {_MARK: [_describe(each, tensors) for each in node]}
    if isinstance(node, list):
        return [_describe(each, tensors) for each in node]
    if isinstance(node, dict):
        return {key: _describe(each, tensors) for key, each in node.items()}
    return node


def _restore(node: Any, tensors: list[Tensor]) -> Any:
    if isinstance(node, list):
        return [_restore(each, tensors) for each in node]
    if not isinstance(node, dict):
        return node
    if set(node) == {_MARK}:
        marked = node[_MARK]
        return tensors[marked] if isinstance(marked, int) else tuple(_restore(each, tensors) for each in marked)
    return {key: _restore(each, tensors) for key, each in node.items()}
