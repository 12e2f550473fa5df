"""A checkpoint's configuration as plain data: dicts, Namespaces, lists and single values.

omegaconf's containers are read by what lies in them, so that no interpolation (`${...}`) is resolved: it stays the
string that it is.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from omegaconf import DictConfig, ListConfig
from omegaconf.nodes import ValueNode

MOST_VALUES = 1_000_000  # NLLB-200's names its 40,000 pairs of languages five times


class ConfigError(ValueError):
    """A configuration that cannot be served: names the field, the rule and the value, not the file."""


def plain(config: Any) -> Any:
    """A copy of `config` without omegaconf's containers; what was one container in two places is one again.

    ConfigError where it holds itself, more than MOST_VALUES values counted wherever they stand, or a whole number
    beyond 64 bits.
    """
    return _Copier().copy(config)[0]


def namespace(fields: dict[str, Any]) -> Namespace:
    """As Namespace(**fields), of any names."""
    made = Namespace()
    vars(made).update(fields)
    return made


def shown(value: Any) -> str:
    """A value in an error's message, never long."""
    if not isinstance(value, str | int | float | type(None)):
        return f"a {type(value).__name__}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


class _Copier:
    def __init__(self):
        # by a container's id: (the container, its copy, how many values it holds); None while it is being copied
        self._done: dict[int, tuple[Any, Any, int] | None] = {}

    def copy(self, value: Any) -> tuple[Any, int]:
        """(copy, number of values)."""
        bare = _bare(value)
        if not isinstance(bare, dict | list | tuple | Namespace):
            if isinstance(bare, int) and not -(1 << 63) <= bare < 1 << 64:
                raise ConfigError("a configuration's whole numbers must have at most 64 bits")
            return bare, 1
        if id(bare) not in self._done:
            self._done[id(bare)] = None
            self._done[id(bare)] = bare, *self._copy_container(bare)
        found = self._done[id(bare)]
        if found is None:
            raise ConfigError("a configuration must not hold itself")
        if found[2] > MOST_VALUES:
            raise ConfigError(f"a configuration must have at most {MOST_VALUES:,} values")
        return found[1:]

    def _copy_container(self, bare: Any) -> tuple[Any, int]:
        fields = vars(bare) if isinstance(bare, Namespace) else bare
        mapping = isinstance(fields, dict)
        items = [self.copy(item) for item in (dict.values(fields) if mapping else fields)]
        copies, values = [copy for copy, _ in items], 1 + sum(number for _, number in items)
        if not mapping:
            return (tuple(copies) if isinstance(bare, tuple) else copies), values
        copied = dict(zip(dict.keys(fields), copies, strict=True))
        return (namespace(copied) if isinstance(bare, Namespace) else copied), values


def _bare(value: Any) -> Any:
    for _ in range(4):
        if isinstance(value, ValueNode):
            value = vars(value).get("_val")
        elif isinstance(value, DictConfig | ListConfig):
            value = vars(value).get("_content")
        else:
            return value
    raise ConfigError("a configuration's node must hold a value, not a node")
