"""Reading a checkpoint's pickle with PyTorch's safe loader and a list of what fairseq's files hold.

Nothing on the list runs code of the file's choosing: containers, configuration nodes and enums are data, and numpy's
two constructors are replaced by ones that take plain numbers and strings only, since numpy's own accept a state with
which a file can corrupt memory. An unsafe load is never a fallback.
"""

from __future__ import annotations

import argparse
import re
import threading
import typing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import omegaconf
import torch
from fairseq.data.multilingual.multilingual_utils import EncoderLangtok, LangTokSpec, LangTokStyle
from fairseq.data.multilingual.sampled_multi_dataset import CollateFormat
from fairseq.data.text_compressor import TextCompressionLevel
from omegaconf import nodes
from omegaconf.base import ContainerMetadata, Metadata

from fairseq_moe_ext.checkpoints.errors import CheckpointError, one_line
from fairseq_moe_ext.torch_versions import loading_offsets


class NumpyDtype:
    """Stands in for `numpy.dtype` while a pickle is read: numbers, booleans and strings only.

    The file's state, of which byte order and length are taken, never reaches numpy.
    """

    def __init__(self, code: str, align: bool = False, copy: bool = False):
        match = re.fullmatch(r"([biufcSU])(\d{1,4})", code) if isinstance(code, str) else None
        if match is None:
            raise ValueError(f"numpy.dtype must be of numbers or strings, got {str(code)[:20]!r}")
        self._kind, self._size, self._order = match.group(1), int(match.group(2)), "="

    def __setstate__(self, state: tuple) -> None:
        order, size = state[1], state[5]
        if order not in ("<", ">", "|", "="):
            raise ValueError(f"a numpy.dtype's byte order must be <, >, | or =, got {order!r}")
        self._order = order
        if self._kind in "SU":
            self._size = int(size) // (4 if self._kind == "U" else 1)

    def build(self) -> np.dtype:
        """The dtype that the pickle describes."""
        return np.dtype(f"{self._order}{self._kind}{self._size}")


def numpy_scalar(dtype: NumpyDtype, data: bytes) -> np.generic:
    """Stands in for `numpy.core.multiarray.scalar`."""
    real = dtype.build()
    if not isinstance(data, bytes) or len(data) != real.itemsize:
        raise ValueError(f"a numpy scalar of {real} must have {real.itemsize} bytes")
    return np.frombuffer(data, dtype=real)[0] if data else real.type()


def plain_dict(factory: Any = None) -> dict:
    """Stands in for `collections.defaultdict`, which the safe loader does not fill."""
    return {}


# what fairseq's checkpoints hold besides tensors and plain containers
SAFE_GLOBALS = (
    argparse.Namespace,
    (plain_dict, "collections.defaultdict"),
    (NumpyDtype, "numpy.dtype"),
    (numpy_scalar, "numpy.core.multiarray.scalar"),
    (numpy_scalar, "numpy._core.multiarray.scalar"),  # numpy 2's name
    # omegaconf's containers, and the types that their nodes name
    omegaconf.DictConfig,
    omegaconf.ListConfig,
    Metadata,
    ContainerMetadata,
    nodes.AnyNode,
    nodes.StringNode,
    nodes.IntegerNode,
    nodes.FloatNode,
    nodes.BooleanNode,
    nodes.BytesNode,
    nodes.EnumNode,
    typing.Any,
    *(bool, bytes, dict, float, int, list, str, tuple),
    # the members of ChoiceEnum's classes cannot be pickled; these can
    *(EncoderLangtok, LangTokSpec, LangTokStyle, CollateFormat, TextCompressionLevel),
)


_LIST = threading.Lock()  # PyTorch has one for the whole process


@contextmanager
def allowed(users_first: bool = False) -> Iterator[None]:
    """In this context PyTorch's safe loader also takes what fairseq's files hold; afterwards its list is as it was.

    users_first: where the program has allowed a name of the list by itself, what it has allowed stands.
    """
    serialization = torch.serialization
    with _LIST:
        users = serialization.get_safe_globals()
        names = {_name(item): item for item in users}
        ours = [item for item in SAFE_GLOBALS if item not in users and not (users_first and _name(item) in names)]
        hidden = [names[_name(item)] for item in ours if _name(item) in names]
        if hidden:
            _replace(hidden, [])
        serialization.add_safe_globals(ours)
        try:
            yield
        finally:
            _replace(ours, hidden)


def _replace(gone: Sequence[Any], new: Sequence[Any]) -> None:
    kept = [item for item in torch.serialization.get_safe_globals() if item not in gone]
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals([*kept, *new])


def _name(item: Any) -> str:
    """Under which a pickle asks for it."""
    return item[1] if isinstance(item, tuple) else f"{item.__module__}.{item.__qualname__}"


def load_safely(file: Path, map_location: str) -> Any:
    """What lies in `file`; CheckpointError where the safe loader refuses it or cannot read it."""
    try:
        with allowed(), loading_offsets() if map_location == "meta" else nullcontext():
            return torch.load(file, map_location=map_location, weights_only=True)
    except Exception as error:  # a damaged pickle makes the unpickler raise anything
        raise CheckpointError(f"{file}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    text = str(error)
    refused = re.search(r"GLOBAL (\S+)", text)
    if refused:
        return f"the safe loader refuses it: {refused.group(1)[:200]} is not on the list of what a file may hold"
    _, marker, rest = text.partition("WeightsUnpickler error: ")
    if marker:
        return f"the safe loader refuses it: {one_line(ValueError(rest.strip() or 'its pickle is damaged'))}"
    return f"not a readable checkpoint: {one_line(error)}"


def revive(value: Any, tensor: typing.Callable[[torch.Tensor], Any]) -> Any:
    """`value`, in place, with every stand-in of a dtype made real and every tensor replaced by `tensor` of it."""
    return _revive(value, tensor, {})


def _revive(value: Any, tensor: typing.Callable[[torch.Tensor], Any], done: dict[int, tuple]) -> Any:
    """done: id -> (value, what became of it), since a value in a thousand places is visited once."""
    if isinstance(value, NumpyDtype):
        return value.build()
    if type(value) is not tuple and not isinstance(value, torch.Tensor | dict | list | argparse.Namespace):
        return value
    if id(value) in done:
        return done[id(value)][1]
    if isinstance(value, torch.Tensor):
        done[id(value)] = value, tensor(value)
        return done[id(value)][1]
    if type(value) is tuple:
        done[id(value)] = value, tuple(_revive(item, tensor, done) for item in value)
        return done[id(value)][1]
    done[id(value)] = value, value
    items = vars(value) if isinstance(value, argparse.Namespace) else value
    for key, item in enumerate(items) if isinstance(items, list) else list(items.items()):
        items[key] = _revive(item, tensor, done)
    return value
