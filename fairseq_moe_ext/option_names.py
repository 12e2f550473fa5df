"""The one definition of how an option is written of which the code knows the attribute's name."""

from __future__ import annotations


def as_option(name: str) -> str:
    """`name`, an attribute of parsed arguments, as the user writes it.

    >>> as_option("expert_buffer_size")
    '--expert-buffer-size'
    """
    return f"--{name.replace('_', '-')}"
