"""A flag of the plugin, declared in one place: its default, its help, the rules for its values, where it works."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from dataclasses import Field, dataclass, field, fields
from enum import Enum
from typing import Any, get_args

from fairseq_moe_ext.option_names import as_option


@dataclass(frozen=True)
class Rules:
    """read: a given value as it is used. check: looks at a value's file or machine. Both raise ValueError with what
    follows the flag's name. needs: (flag, its value or None for any) without which this one does nothing.
    experts: whether a dense model cannot obey it. training: whether fairseq-train takes it, too.
    """

    read: Callable[[Any], Any] | None = None
    check: Callable[[Any], None] | None = None
    needs: tuple[str, str | None] | None = None
    experts: bool = True
    training: bool = False


def flag(default: Any, help: str, **rules: Any) -> Any:
    """A field of a dataclass of flags, under `Rules(**rules)`; its type is what fairseq's parser reads."""
    return field(default=default, metadata={"help": help, "rules": Rules(**rules)})


def flags_of(kind: type) -> Iterator[tuple[Field, Rules]]:
    """The flags that `kind` and what it inherits from declare."""
    return ((item, item.metadata["rules"]) for item in fields(kind) if "rules" in item.metadata)


def is_given(item: Field, flags: Any) -> bool:
    """Whether `flags`, a task's arguments, have another value than the default."""
    return str(getattr(flags, item.name, item.default)) != str(item.default)


def values_of(kind: type, flags: Any) -> dict[str, Any]:
    """Every flag's value as it is used; ValueError naming flag, rule and value."""
    return {item.name: _value(item, rules, flags) for item, rules in flags_of(kind)}


def check_values(kind: type, flags: Any) -> None:
    """ValueError naming flag, rule and value, for the first value that cannot be."""
    for item, rules in flags_of(kind):
        value = _value(item, rules, flags)
        if rules.check is not None and value is not None:
            _named(item, rules.check, value)


def check_needs(kind: type, flags: Any, written: Container[str] = ()) -> None:
    """ValueError naming both flags and the value, for the first that lacks what it needs.

    written: names of flags that the user wrote, be it with their default.
    """
    for item, rules in flags_of(kind):
        if rules.needs is None or not (item.name in written or is_given(item, flags)):
            continue
        name, wanted = rules.needs
        found = getattr(flags, name, None)
        if found is None or wanted is not None and str(found) != wanted:
            needed = as_option(name) if wanted is None else f"{as_option(name)} {wanted}"
            raise ValueError(f"{as_option(item.name)} needs {needed}, got {getattr(flags, item.name)} without it")


def _value(item: Field, rules: Rules, flags: Any) -> Any:
    value = getattr(flags, item.name, item.default)
    if value is None:
        return None
    if choices := _choices(item):
        value = str(value)
        if value not in choices:
            raise ValueError(f"{as_option(item.name)} must be one of {', '.join(choices)}, got {value!r}")
    return value if rules.read is None else _named(item, rules.read, value)


def _choices(item: Field) -> list[str]:
    """Of a ChoiceEnum; none of any other type."""
    for kind in (item.type, *get_args(item.type)):
        if isinstance(kind, type) and issubclass(kind, Enum):
            return [str(member.value) for member in kind]
    return []


def _named(item: Field, function: Callable[[Any], Any], value: Any) -> Any:
    try:
        return function(value)
    except ValueError as error:
        raise ValueError(f"{as_option(item.name)} {error}") from error
