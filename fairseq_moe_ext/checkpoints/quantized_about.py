"""What a quantised checkpoint says of itself: the JSON object in its file's metadata, and the names in the file.

A file has each expert as one block (`<MoE layer>.experts.<number>.int4`), each dense matrix in int8 as one
(`<its weight's key>.int8`), other tensors under their own keys, and text files as bytes (`file/<name>`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from fairseq_moe_ext.bounded_json import parse_json
from fairseq_moe_ext.checkpoints.kept_experts import KeptExperts
from fairseq_moe_ext.experts.formats import QUANTIZED
from fairseq_moe_ext.kernels.block import GROUP

FORMAT_VERSION = 1
METADATA_KEY = "fairseq_moe_ext"
FILE_PREFIX = "file/"  # before the name of a text file in the names of the tensors
INT8_SUFFIX = ".int8"  # after a dense weight's key
DENSE = ("int8", "float16", "float32")
_STATE = {
    "args": dict | None,
    "cfg": dict | None,
    "extra_state": dict,
    "optimizer_history": list,
    "task_state": dict,
}


@dataclass(frozen=True)
class QuantizedSource:
    """What the file was made of. fingerprint: SHA-256 in hex, equal for equal weights. files: names and bytes.
    licence: as the source says it, None where it does not."""

    fingerprint: str
    files: tuple[tuple[str, int], ...]
    licence: str | None


@dataclass(frozen=True)
class QuantizedAbout:
    """experts, dense: what they are in, one of QUANTIZED and of DENSE. quantizer: experts.quantize.VERSION.

    calibrated: the fingerprint of the record that the quantiser followed. aliases: a tensor's name -> the name under
    which its values stand in the file. dims: what bytes alone do not tell, `<MoE layer>.experts.` -> model dim and
    hidden dim of its experts, and a dense matrix's key -> outputs and inputs. state: of the checkpoint, all but the
    model, as plain JSON: `args` and `cfg` are objects or None, `extra_state` and `task_state` objects,
    `optimizer_history` a list. kept: of a pruned model, whose experts have the numbers from 0 on in the file; None: it
    is whole.
    """

    experts: str
    dense: str
    group: int
    quantizer: int
    source: QuantizedSource
    calibrated: str | None
    aliases: dict[str, str]
    dims: dict[str, tuple[int, int]]
    state: dict[str, Any]
    kept: KeptExperts | None = None

    def as_json(self) -> str:
        """For the metadata; ValueError where the state is no JSON."""
        content = asdict(self)
        if self.kept is None:
            del content["kept"]
        return json.dumps({"version": FORMAT_VERSION, **content}, allow_nan=False)

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> QuantizedAbout:
        """ValueError, which names no file, unless the metadata is that of a quantised checkpoint of this version."""
        text = metadata.get(METADATA_KEY)
        if not isinstance(text, str):
            raise ValueError(f"not a quantised checkpoint: its metadata must have {METADATA_KEY}")
        content = parse_json(text.encode())
        version = content.pop("version", None) if isinstance(content, dict) else None
        if version != FORMAT_VERSION:
            raise ValueError(f"a quantised checkpoint must be of format version {FORMAT_VERSION}, got {version!r:.40}")
        names = [each.name for each in fields(cls)]
        if set(content) | {"kept"} != set(names):
            wrong = sorted(set(names) - {"kept"} ^ set(content) - {"kept"})[0]
            raise ValueError(f"a quantised checkpoint must say {', '.join(names)}; wrong or missing: {wrong:.80}")
        _check(content, "experts", content["experts"] in tuple(QUANTIZED), f"one of {', '.join(QUANTIZED)}")
        _check(content, "dense", content["dense"] in DENSE, f"one of {', '.join(DENSE)}")
        _check(content, "group", content["group"] == GROUP, str(GROUP))
        _check(content, "quantizer", type(content["quantizer"]) is int, "a whole number")
        _check(content, "calibrated", isinstance(content["calibrated"], str | None), "a string or null")
        _check(content, "aliases", _are_names(content["aliases"]), "an object of names")
        _check(content, "dims", _are_dims(content["dims"]), "an object of two sizes each")
        _check(content, "state", _is_state(content["state"]), "a checkpoint's state")
        _check(content, "source", _is_source(content["source"]), "fingerprint, files and licence")
        source = content["source"]
        files = tuple((name, size) for name, size in source["files"])
        content["dims"] = {name: tuple(sizes) for name, sizes in content["dims"].items()}
        content["kept"] = None if content.get("kept") is None else KeptExperts.from_json(content["kept"])
        return cls(**{**content, "source": QuantizedSource(source["fingerprint"], files, source["licence"])})


def _check(content: dict[str, Any], name: str, holds: bool, rule: str) -> None:
    if not holds:
        raise ValueError(f"{name} of a quantised checkpoint must be {rule}, got {content[name]!r:.80}")


def _are_names(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(name, str) for name in value.values())


def _are_dims(value: Any) -> bool:
    if not isinstance(value, dict) or not all(isinstance(sizes, list) and len(sizes) == 2 for sizes in value.values()):
        return False
    return all(type(size) is int and 0 < size < 1 << 31 for sizes in value.values() for size in sizes)


def _is_state(value: Any) -> bool:
    if not isinstance(value, dict) or set(value) != set(_STATE):
        return False
    return all(isinstance(value[name], types) for name, types in _STATE.items())


def _is_source(value: Any) -> bool:
    if not isinstance(value, dict) or set(value) != {each.name for each in fields(QuantizedSource)}:
        return False
    files = value["files"]
    return (
        isinstance(value["fingerprint"], str)
        and isinstance(value["licence"], str | None)
        and isinstance(files, list)
        and all(isinstance(f, list) and len(f) == 2 and isinstance(f[0], str) and type(f[1]) is int for f in files)
    )
