"""What a checkpoint's pickle may do, told from its opcodes before PyTorch's safe loader makes anything of it.

The safe loader's list says which names may stand in a file. It does not say how often, in what and with what they are
used: a file of some KB can ask for objects that fill the memory, for a dictionary's key that takes years to hash, or
for `str` of a list that is as large when it is written out. The rules here are few:
- objects take no more memory than a bound that grows with the file, and its opcodes no more time than another one;
- a tuple holds at most TUPLE_VALUES values, counted with all that it holds, DEPTH deep;
- keys are strings and numbers of 64 bits, whose hashes a file can hardly make collide; a few may be tuples of them;
- what is called is on a list, and with plain arguments.
A pickle that is cut off or malformed passes: the safe loader stops at the same opcode.
"""

from __future__ import annotations

import pickle
import struct
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable
from typing import BinaryIO

from fairseq_moe_ext.checkpoints.errors import CheckpointError

TUPLE_VALUES, DEPTH = 100_000, 100
ROOM = 32_000_000  # bytes of objects that any file may ask for; besides, half of its own size
STEPS = 2_000_000  # opcodes of any file, about a second; besides, one for so many bytes of its own size:
BYTES_PER_STEP = 500
ODD_KEYS = 1000  # of any file: each costs time by the number of those before it

_TENSORS = {
    *(f"torch._utils.{name}" for name in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3")),
    *("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"),
}
_WITH_ATTRIBUTES = "torch._tensor._rebuild_from_type_v2"
_COLLECTIONS = {"builtins.set", "collections.Counter", "collections.OrderedDict", "collections.defaultdict"}
_VALUES = {
    *("numpy.dtype", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"),
    *("builtins.complex", "torch.Size", "torch.device", "torch.serialization._get_layout"),
}
_ENUMS = ("fairseq.data.",)  # what the safe loader's list has of fairseq are enums
_OBJECTS = ("argparse.Namespace", "omegaconf.")  # made without arguments, then given their state
# bytes that an object takes, roughly
_CELL, _CONTAINER, _ENTRY, _OBJECT, _STORAGE, _TENSOR, _MEMO = 8, 80, 100, 400, 600, 1500, 120
# what these take of the safe loader's time, in other opcodes': it goes through its list, at PROTO it warns
_SLOW = {
    **dict.fromkeys((pickle.NEWOBJ, pickle.REDUCE, pickle.BUILD, pickle.BINPERSID), 20),
    **dict.fromkeys((pickle.GLOBAL, pickle.PROTO), 40),
}


class _Item:
    """What stands on the unpickler's stack.

    plain: of numbers and strings only. name: of a global, or of what was called. size, depth: of a tuple.
    """

    __slots__ = ("children", "depth", "kind", "name", "plain", "sealed", "size", "text")

    def __init__(self, kind: str, name: str = "", plain: bool = True, text: str | None = None, children: tuple = ()):
        self.kind, self.name, self.plain, self.text, self.children = kind, name, plain, text, children
        self.size, self.depth, self.sealed = 1, 0, False


_SCALAR = _Item("scalar")
_LONG = _Item("long", plain=False)


def check_pickles(file: BinaryIO, number: int, size: int, path: object) -> None:
    """CheckpointError unless the `number` pickles from `file`'s position on keep the rules.

    size: bytes of the whole checkpoint file, by which its room grows. path: for the error.
    """
    scan = _Scan(file, ROOM + size // 2, STEPS + size // BYTES_PER_STEP)
    try:
        for _ in range(number):
            scan.run()
    except _Refused as error:
        raise CheckpointError(f"{path}: the safe loader refuses it: {error}") from None
    except (EOFError, IndexError, KeyError, struct.error, UnicodeDecodeError):
        return


class _Refused(Exception):
    pass


class _Scan:
    """The stack and the memo of an unpickler, with items in the place of objects."""

    def __init__(self, file: BinaryIO, room: int, steps: int):
        self._file, self._room, self._left = file, room, room
        self._steps, self._steps_left = steps, steps
        self._odd_keys = 0

    def run(self) -> None:
        """Up to STOP; EOFError at an opcode that the safe loader does not know."""
        self._stack: list[_Item] = []
        self._marks: list[list[_Item]] = []
        self._memo: dict[int, _Item] = {}
        while True:
            code = self._file.read(1)
            if code == pickle.STOP:
                return
            step = _STEPS.get(code)
            if step is None:
                raise EOFError
            self._steps_left -= _SLOW.get(code, 1)
            if self._steps_left < 0:
                raise _Refused(f"its pickle must take at most {self._steps:,} steps")
            step(self)

    def _take(self, cost: int) -> None:
        self._left -= cost
        if self._left < 0:
            raise _Refused(f"its objects must take at most {self._room:,} bytes of memory")

    def _read(self, number: int) -> bytes:
        data = self._file.read(number)
        if len(data) < number:
            raise EOFError
        return data

    def _push(self, item: _Item, cost: int = _CELL) -> None:
        self._take(cost)
        self._stack.append(item)

    def _pop_mark(self) -> list[_Item]:
        items, self._stack = self._stack, self._marks.pop()
        return items

    def mark(self) -> None:
        self._take(_CONTAINER)
        self._marks.append(self._stack)
        self._stack = []

    def scalar(self, length: int) -> None:
        self._read(length)
        self._push(_SCALAR, 40)

    def counted(self, kind: str, width: int) -> None:
        """A string or number after its length, which takes `width` bytes."""
        length = int.from_bytes(self._read(width), "little")
        self._take(60 + 4 * length)
        data = self._read(length)
        if kind == "number" and length > 8 and not 0 <= int.from_bytes(data, "little", signed=True) < 1 << 64:
            self._stack.append(_LONG)
            return
        text = data.decode(errors="replace") if kind == "text" and length <= 20 else None
        self._stack.append(_SCALAR if text is None else _Item("text", text=text))

    def global_name(self) -> None:
        module, name = (self._file.readline()[:-1].decode() for _ in range(2))
        if (module, name) in NAME_MAPPING:
            module, name = NAME_MAPPING[module, name]
        self._push(_Item("global", f"{IMPORT_MAPPING.get(module, module)}.{name}"))

    def container(self, kind: str) -> None:
        self._push(_Item(kind), 3 * _CONTAINER if kind == "set" else _CONTAINER)

    def tuple_of(self, number: int | None) -> None:
        if number is None:
            items = self._pop_mark()
        else:
            items = [self._stack.pop() for _ in range(number)][::-1]
        item = _Item("tuple", plain=all(part.plain for part in items), children=tuple(items[:8]))
        for part in items:
            if part.kind == "list":
                part.sealed = True
        item.size += sum(part.size for part in items)
        item.depth = 1 + max((part.depth for part in items), default=0)
        if item.size > TUPLE_VALUES or item.depth > DEPTH:
            raise _Refused(f"a tuple must hold at most {TUPLE_VALUES:,} values, {DEPTH} deep, with all that it holds")
        self._push(item, _CONTAINER + _CELL * len(items))

    def append(self, several: bool) -> None:
        items = self._pop_mark() if several else [self._stack.pop()]
        target = self._target("list")
        if target.sealed:
            raise _Refused("a list must be complete before a tuple holds it")
        self._take(2 * _CELL * len(items))
        target.plain = target.plain and all(item.kind in ("scalar", "text") for item in items)

    def set_items(self, several: bool) -> None:
        items = self._pop_mark() if several else [self._stack.pop() for _ in range(2)][::-1]
        self._take(_ENTRY * len(items) // 2)
        if not all(key.plain for key in items[::2]):
            raise _Refused("a dictionary's keys must be numbers, strings or tuples of them, of at most 64 bits")
        self._odd_keys += sum(key.kind not in ("scalar", "text") for key in items[::2])
        if self._odd_keys > ODD_KEYS:
            raise _Refused(f"at most {ODD_KEYS} keys of its dictionaries may be tuples or other objects")
        self._target("dict", "collection").plain = False

    def _target(self, *kinds: str) -> _Item:
        """The container that grows; EOFError where the safe loader finds none."""
        if self._stack[-1].kind not in kinds:
            raise EOFError
        return self._stack[-1]

    def remember(self, width: int) -> None:
        self._take(_MEMO)
        self._memo[int.from_bytes(self._read(width), "little")] = self._stack[-1]

    def recall(self, width: int) -> None:
        self._push(self._memo[int.from_bytes(self._read(width), "little")])

    def storage(self) -> None:
        self._stack.pop()
        self._push(_Item("storage", plain=False), _STORAGE)

    def new_object(self) -> None:
        arguments, made = self._stack.pop(), self._stack.pop()
        if made.kind != "global" or not made.name.startswith(_OBJECTS) or arguments.kind != "tuple":
            raise _not_listed(made)
        if arguments.size > 1:
            raise _Refused(f"{made.name} must be made without arguments")
        self._push(_Item("object", made.name, plain=False), _OBJECT)

    def build(self) -> None:
        self._stack.pop()
        target = self._stack[-1]
        if target.kind != "object" and target.name not in ("collections.OrderedDict", "numpy.dtype"):
            raise _Refused(f"{target.name or target.kind} must have no state of its own")

    def call(self) -> None:
        arguments, called = self._stack.pop(), self._stack.pop()
        if called.kind != "global":
            raise _not_listed(called)
        if arguments.kind != "tuple":
            raise _Refused(f"{called.name} must be called with a tuple")
        if called.name in _TENSORS or called.name == _WITH_ATTRIBUTES:
            if called.name == _WITH_ATTRIBUTES and arguments.children[0].name not in _TENSORS:
                raise _Refused(f"{called.name} must be of a tensor")
            self._push(_Item("tensor", called.name, plain=False), _TENSOR)
            return
        _check_call(called, arguments)
        kind = "collection" if called.name in _COLLECTIONS else "value"
        self._push(_Item(kind, called.name, plain=kind == "value"), 3 * _CONTAINER)


def _check_call(called: _Item, arguments: _Item) -> None:
    """_Refused unless the call of a name that makes no tensor is one that fairseq's files hold."""
    name, given = called.name, arguments.children
    if name == "_codecs.encode":  # bytes, as they lie in a pickle of protocol 2; other codecs can double them
        fits = len(given) == 2 and given[1].text == "latin1"
    elif name == "builtins.bytes":
        fits = not given
    elif name == "builtins.bytearray":  # of a number it would be as long
        fits = not given or given[0].name == "_codecs.encode"
    elif name in _COLLECTIONS:  # of a list of tuples it would be as slow as their hashes collide
        fits = all(each.kind in ("list", "global") and each.plain for each in given)
        fits = fits or name == "collections.Counter" and given[0].kind == "dict"
    elif name in _VALUES or name.startswith(_ENUMS):
        fits = arguments.plain
    else:
        raise _not_listed(called)
    if not fits:
        raise _Refused(f"{name} must be of numbers or strings, as PyTorch writes it")


def _not_listed(item: _Item) -> _Refused:
    return _Refused(f"{(item.name or item.kind)[:200]} is not on the list of what a file may hold")


def _with(method: Callable, *given) -> Callable[[_Scan], None]:
    return lambda scan: method(scan, *given)


_STEPS: dict[bytes, Callable[[_Scan], object]] = {
    pickle.PROTO: lambda scan: scan._read(1),
    pickle.MARK: _Scan.mark,
    pickle.GLOBAL: _Scan.global_name,
    pickle.NEWOBJ: _Scan.new_object,
    pickle.REDUCE: _Scan.call,
    pickle.BUILD: _Scan.build,
    pickle.BINPERSID: _Scan.storage,
    pickle.APPEND: _with(_Scan.append, False),
    pickle.APPENDS: _with(_Scan.append, True),
    pickle.SETITEM: _with(_Scan.set_items, False),
    pickle.SETITEMS: _with(_Scan.set_items, True),
    pickle.TUPLE: _with(_Scan.tuple_of, None),
    pickle.BINUNICODE: _with(_Scan.counted, "text", 4),
    pickle.SHORT_BINSTRING: _with(_Scan.counted, "bytes", 1),
    pickle.LONG1: _with(_Scan.counted, "number", 1),
    **{code: _with(_Scan.tuple_of, n) for n, code in enumerate((pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3), 1)},
    pickle.EMPTY_TUPLE: _with(_Scan.tuple_of, 0),
    **{code: _with(_Scan.scalar, 0) for code in (pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE)},
    **{code: _with(_Scan.scalar, n) for code, n in ((pickle.BININT, 4), (pickle.BININT1, 1), (pickle.BININT2, 2))},
    pickle.BINFLOAT: _with(_Scan.scalar, 8),
    pickle.EMPTY_LIST: _with(_Scan.container, "list"),
    pickle.EMPTY_DICT: _with(_Scan.container, "dict"),
    pickle.EMPTY_SET: _with(_Scan.container, "set"),
    **{code: _with(_Scan.remember, n) for code, n in ((pickle.BINPUT, 1), (pickle.LONG_BINPUT, 4))},
    **{code: _with(_Scan.recall, n) for code, n in ((pickle.BINGET, 1), (pickle.LONG_BINGET, 4))},
}
