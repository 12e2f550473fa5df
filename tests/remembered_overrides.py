"""What hydra's grammar makes of a `key=value`, remembered: fairseq's configurations have 300, most of them known."""

from __future__ import annotations

import copy
import functools

from hydra.core.override_parser.overrides_parser import OverridesParser


@functools.cache  # once, by whoever comes first
def remember() -> None:
    """From here on this process parses each text once; a text that is refused is refused again."""
    parse = OverridesParser.parse_rule
    remembered = functools.cache(lambda text, rule: parse(OverridesParser.create(), text, rule))
    OverridesParser.parse_rule = lambda _self, text, rule: copy.copy(remembered(text, rule))
