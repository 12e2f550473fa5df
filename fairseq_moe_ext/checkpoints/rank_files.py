"""What rank files must be to one another: parts of one model, in the order of their ranks.

Legend: L = experts in each rank file.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor

from fairseq_moe_ext.checkpoints.errors import CheckpointError
from fairseq_moe_ext.checkpoints.state_keys import EXPERT_KEY, GATE_KEY, is_expert_key


@dataclass(frozen=True)
class Told:
    """What a file says of the checkpoint that it belongs to; None: nothing."""

    file: Path
    updates: int | None
    rank: int | None


def experts_per_file(model: dict[str, Tensor], file: Path) -> int:
    """L; the local numbers in every layer must run from 0 without a gap."""
    numbers: dict[str, set[int]] = {}
    for match in map(EXPERT_KEY.match, model):
        if match:
            numbers.setdefault(match.group(1), set()).add(int(match.group(2)))
    counts = {len(found) for found in numbers.values()}
    if len(counts) != 1 or any(max(found) + 1 != len(found) for found in numbers.values()):
        raise CheckpointError(f"{file}: a rank file must hold the same experts 0, 1, ... in every MoE layer")
    return counts.pop()


def global_experts(model: dict[str, Tensor], file: Path, first: int) -> dict[str, Tensor]:
    """A rank file's experts with local number j under their global one, `first` + j; its other keys are left out."""
    experts = {}
    for key, tensor in model.items():
        match = EXPERT_KEY.match(key)
        if match is None:
            if is_expert_key(key):
                raise CheckpointError(f"{file}: not a key of an expert in a MoE layer: {key}")
            continue
        prefix, number, rest = match.groups()
        experts[f"{prefix}{first + int(number)}{rest}"] = tensor
    return experts


def check_of_one_model(shared: dict, shared_file: Path, states: Sequence[dict], files: Sequence[Path]) -> None:
    """CheckpointError where the shared file and the rank files are not parts of one checkpoint of one model.

    Two models of one shape are told apart by the number of updates they had, where the files say it.
    """
    _check_same_tensors(states, files)
    _check_layers(shared["model"], shared_file, states[0]["model"], files[0])
    check_updates(_told([shared, *states], [shared_file, *files]))
    _check_order(states, files)


def rank_told(state: dict[str, Any]) -> int | None:
    """The rank that wrote a file, by the configuration in it."""
    cfg, args = state.get("cfg"), state.get("args")
    value = _get(_get(cfg, "distributed_training"), "distributed_rank")
    value = _get(args, "distributed_rank") if value is None else value
    return value if isinstance(value, int) else None


def _check_same_tensors(states: Sequence[dict], files: Sequence[Path]) -> None:
    wanted = {key: (tensor.shape, tensor.dtype) for key, tensor in states[0]["model"].items()}
    for state, file in zip(states[1:], files[1:], strict=True):
        found = {key: (tensor.shape, tensor.dtype) for key, tensor in state["model"].items()}
        for key in [*wanted, *found]:
            if wanted.get(key) != found.get(key):
                raise CheckpointError(
                    f"{file}: rank files must be of one model: {key} is {_describe(wanted.get(key))} in "
                    f"{files[0].name}, here {_describe(found.get(key))}"
                )


def _told(states: Sequence[dict], files: Sequence[Path]) -> list[Told]:
    return [Told(file, updates(state), rank_told(state)) for state, file in zip(states, files, strict=True)]


def check_updates(told: Sequence[Told]) -> None:
    """CheckpointError where two files say that they were saved after different numbers of updates."""
    known = [each for each in told if each.updates is not None]
    for each in known[1:]:
        if each.updates != known[0].updates:
            raise CheckpointError(
                f"{each.file}: all files must be of one checkpoint: {known[0].file.name} was saved after "
                f"{known[0].updates} updates, this one after {each.updates}"
            )


def _check_layers(shared: dict[str, Tensor], shared_file: Path, experts: dict[str, Tensor], file: Path) -> None:
    gates = {match.group(1): shared[match.string] for match in map(GATE_KEY.match, shared) if match}
    layers = {match.group(1).removesuffix(".experts.") for match in map(EXPERT_KEY.match, experts) if match}
    for layer in sorted(set(gates) ^ layers):
        there, lacking = (shared_file, file) if layer in gates else (file, shared_file)
        raise CheckpointError(f"{lacking}: it must have the MoE layer {layer} that {there.name} has")
    for layer, gate in gates.items():
        weight = experts.get(f"{layer}.experts.0.fc1.weight")
        if weight is not None and gate.shape[1:] != weight.shape[1:]:
            raise CheckpointError(
                f"{file}: rank files must be of the shared file's model: the gate of {layer} has model dim "
                f"{gate.size(1)}, an expert's fc1.weight is {tuple(weight.shape)}"
            )


def _check_order(states: Sequence[dict], files: Sequence[Path]) -> None:
    if not check_ranks(_told(states, files)):
        _check_not_twice(states, files)


def check_ranks(told: Sequence[Told]) -> bool:
    """Whether the files, in their order, say which ranks wrote them; CheckpointError where those do not rise."""
    ranks = [each.rank for each in told]
    if None in ranks or set(ranks) == {0}:  # a tool gave all files the first one's configuration
        return False
    # ascending, not equal to the file's number: people merge and renumber files
    for before, each in pairwise(told):
        if each.rank <= before.rank:
            raise CheckpointError(
                f"{each.file}: rank files must stand in the order of the ranks that wrote them: this one was written "
                f"by rank {each.rank}, the one before by rank {before.rank}"
            )
    return True


def _check_not_twice(states: Sequence[dict], files: Sequence[Path]) -> None:
    """The same experts in two files are one file under two names; told by the checksums, so by archives alone."""
    seen: dict[tuple, Path] = {}
    for state, file in zip(states, files, strict=True):
        checksums = [getattr(tensor, "checksum", None) for key, tensor in state["model"].items() if is_expert_key(key)]
        if None in checksums:
            return
        twin = seen.setdefault(tuple(checksums), file)
        if twin != file:
            raise CheckpointError(f"{file}: an expert must stand in one rank file, found the same ones in {twin.name}")


def updates(state: dict[str, Any]) -> int | None:
    """How many updates a model had when it was saved, None where the file does not say it."""
    history = state.get("optimizer_history")
    number = _get(history[-1], "num_updates") if isinstance(history, list) and history else None
    return number if isinstance(number, int) else None


def _get(value: Any, name: str) -> Any:
    fields = vars(value) if isinstance(value, Namespace) else value
    return fields.get(name) if isinstance(fields, dict) else None


def _describe(found: tuple | None) -> str:
    return "missing" if found is None else f"{tuple(found[0])} {str(found[1]).removeprefix('torch.')}"
