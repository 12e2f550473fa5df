"""A checkpoint in any of fairseq's layouts as what a model is quantised from.

The shared file and the rank files are read one by one; a model that is cut into shards only together.

Legend: E = experts of the model, L = experts in each rank file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fairseq_moe_ext.checkpoints.checkpoint import renamed
from fairseq_moe_ext.checkpoints.checkpoint_file import FileContent, read_file
from fairseq_moe_ext.checkpoints.checkpoint_summary import place_of
from fairseq_moe_ext.checkpoints.checkpoint_task import languages_of
from fairseq_moe_ext.checkpoints.errors import CheckpointError
from fairseq_moe_ext.checkpoints.find_files import NAME, find_checkpoint_files
from fairseq_moe_ext.checkpoints.fsdp_shards import read_rank_shard, read_shards
from fairseq_moe_ext.checkpoints.loading import EMBEDDINGS, Loading
from fairseq_moe_ext.checkpoints.plain_json import json_state
from fairseq_moe_ext.checkpoints.quantization_source import (
    PartContent,
    Source,
    SourceModel,
    SourcePart,
    SourceTensor,
    digest,
)
from fairseq_moe_ext.checkpoints.rank_files import (
    Told,
    check_ranks,
    check_updates,
    experts_per_file,
    global_experts,
    rank_told,
    updates,
)
from fairseq_moe_ext.checkpoints.served_config import task_fields
from fairseq_moe_ext.checkpoints.state_keys import EXPERT_KEY, expert_count, is_dense_matrix, is_expert_key

LANGUAGES = "langs.txt"
_RANK = re.compile(r"-rank-(\d+)(-shard\d+)?\.pt$")


class FairseqSource(Source):
    """path: as for `--path`. files: text files that go with it, by name. check: raises CheckpointError where these do
    not fit embeddings of so many rows, and a task of these fields."""

    def __init__(
        self, path: str, files: Mapping[str, bytes], check: Callable[[set[int], dict[str, Any]], None] | None = None
    ):
        self.path = path
        self._files, self._check = files, check
        self._names: tuple[str, ...] = ()

    def model(self) -> SourceModel | None:
        """As `Source` has it."""
        if not (first := self._first_files()):
            return None
        content = self._read_first(first)
        model = {renamed(key): tensor for key, tensor in content.state["model"].items()}
        names = tuple(file.name for file in first)
        rank = self._a_rank_file()
        if self._is_ranked():
            if rank is None:
                return None
            model = {key: tensor for key, tensor in model.items() if not is_expert_key(key)}
            of_rank = read_rank_shard(rank, Loading(str(rank)))["model"]
            experts = expert_count(model)
            ranks, rest = divmod(experts, experts_per_file(of_rank, rank))
            if rest or not experts:
                raise CheckpointError(f"{rank}: the experts in a rank file must divide the model's {experts}")
            names += tuple(_RANK.sub(_numbered(number), rank.name) for number in range(ranks))
            shapes = _shapes_of_all(of_rank, experts)
        else:
            expert_count(model)  # the gates agree
            shapes = {}
        aliases = _aliases(model)
        shapes |= {key: tuple(tensor.shape) for key, tensor in model.items() if key not in aliases}
        fields = task_fields(content.state)
        if self._check is not None:
            self._check({model[key].size(0) for key in EMBEDDINGS if key in model}, fields)
        languages = languages_of(fields)
        files = dict(self._files)
        if languages and files:
            files[LANGUAGES] = "".join(f"{language}\n" for language in languages).encode()
        return SourceModel(shapes, aliases, json_state(content.state), files, None, names)

    def waits_for(self) -> str:
        """As `Source` has it."""
        if not self._is_ranked():
            find_checkpoint_files(self.path)
        folder, stem = Path(self.path).parent, self._stem()
        if not self._first_files():
            if any(_is_part(file.name, stem, "-shared-shard\\d+") for file in self._beside()):
                find_checkpoint_files(self.path)  # says which shard is missing
            return str(folder / f"{stem}-shared.pt")
        return str(folder / f"{stem}-rank-0.pt")

    def parts(self, names: Sequence[str]) -> list[SourcePart]:
        """As `Source` has it: rank files each by itself, all others together."""
        folder = Path(self.path).parent
        self._names = tuple(names)
        together = tuple(folder / name for name in names if not _RANK.search(name))
        return [SourcePart(together), *(SourcePart((folder / name,)) for name in names if _RANK.search(name))]

    def content(self, part: SourcePart) -> PartContent:
        """As `Source` has it."""
        ranks = [name for name in self._names if _RANK.search(name)]
        if part.name in ranks:
            file = part.files[0]
            state = read_rank_shard(file, Loading(str(file)))
            first = ranks.index(part.name) * experts_per_file(state["model"], file)
            checksums = _checksums(state["model"])
            model = global_experts(state["model"], file, first)
        else:
            state = self._read_first(part.files, bool(ranks)).state
            model = {renamed(key): tensor for key, tensor in state["model"].items()}
            for alias in _aliases(model):
                del model[alias]
            if ranks:
                model = {key: tensor for key, tensor in model.items() if not is_expert_key(key)}
            checksums = None
        tensors = sorted((SourceTensor(key, key, tensor) for key, tensor in model.items()), key=_place)
        return PartContent(tensors, {"updates": updates(state), "rank": rank_told(state), "experts": checksums})

    def check_told(self, told: Mapping[str, dict[str, Any]]) -> None:
        """As `Source` has it."""
        folder = Path(self.path).parent
        found = [Told(folder / name, each.get("updates"), each.get("rank")) for name, each in told.items()]
        check_updates(found)
        if check_ranks([each for each in found if _RANK.search(each.file.name)]):
            return
        seen: dict[str, str] = {}  # the same experts in two files are one file under two names
        for name, each in told.items():
            if (experts := each.get("experts")) is not None and (twin := seen.setdefault(experts, name)) != name:
                raise CheckpointError(
                    f"{folder / name}: an expert must stand in one rank file, found the same ones in {twin}"
                )

    def _stem(self) -> str:
        match = NAME.fullmatch(Path(self.path).name)
        return match.group(1) if match else Path(self.path).stem

    def _is_ranked(self) -> bool:
        """Whether experts lie in rank files."""
        match = NAME.fullmatch(Path(self.path).name)
        if match is None or Path(self.path).is_file() and not (match.group(2) or match.group(3)):
            return False
        return any(match for file in self._beside() if _is_part(file.name, self._stem(), "-shared|-rank-\\d+"))

    def _beside(self) -> list[Path]:
        folder = Path(self.path).parent
        return sorted(folder.glob("*.pt")) if folder.is_dir() else []

    def _first_files(self) -> tuple[Path, ...]:
        """The whole file, the shared one, or their shards; () where these are not there."""
        if not self._is_ranked():
            try:
                found = find_checkpoint_files(self.path)
            except CheckpointError:
                return ()
            return found.shards or (found.first,)
        folder, stem = Path(self.path).parent, self._stem()
        if (shared := folder / f"{stem}-shared.pt").is_file():
            return (shared,)
        shards = [file for file in self._beside() if _is_part(file.name, stem, "-shared-shard\\d+")]
        if not shards:
            return ()
        in_order = tuple(folder / f"{stem}-shared-shard{number}.pt" for number in range(len(shards)))
        return in_order if set(in_order) == set(shards) else ()

    def _a_rank_file(self) -> Path | None:
        return next((file for file in self._beside() if _is_part(file.name, self._stem(), "-rank-\\d+")), None)

    def _read_first(self, files: Sequence[Path], is_shared: bool | None = None) -> FileContent:
        loading = Loading(str(files[0]))
        if len(files) == 1 and "-shard" not in files[0].name:
            return read_file(files[0], loading)
        has_experts = not (self._is_ranked() if is_shared is None else is_shared)
        return read_shards(files, loading, has_experts)


def _is_part(name: str, stem: str, part: str) -> bool:
    return re.fullmatch(rf"{re.escape(stem)}({part})(-shard\d+)?\.pt", name) is not None


def _numbered(rank: int) -> Any:
    return lambda match: f"-rank-{rank}{f'-shard{rank}' if match.group(2) else ''}.pt"


def _shapes_of_all(of_rank: Mapping[str, Tensor], experts: int) -> dict[str, tuple[int, ...]]:
    """Of E experts in every layer of a rank file, which has expert 0."""
    shapes = {}
    for key, tensor in of_rank.items():
        match = EXPERT_KEY.match(key)
        if match and match.group(2) == "0":
            for number in range(experts):
                shapes[f"{match.group(1)}{number}{match.group(3)}"] = tuple(tensor.shape)
    return shapes


def _aliases(model: Mapping[str, Tensor]) -> dict[str, str]:
    """Key -> the first one with its values, of dense matrices: tied embeddings lie in a file once or twice."""
    first: dict[Any, str] = {}
    found = {}
    for key, tensor in model.items():
        if is_dense_matrix(key, tensor.shape):
            known = first.setdefault(getattr(tensor, "checksum", None) or place_of(tensor), key)
            if known != key:
                found[key] = known
    return found


def _checksums(of_rank: Mapping[str, Tensor]) -> str | None:
    """One word for all experts of a rank file; None where it has no checksums."""
    found = {key: getattr(tensor, "checksum", None) for key, tensor in of_rank.items() if is_expert_key(key)}
    return None if None in found.values() else digest([f"{key} {checksum}" for key, checksum in found.items()])


def _place(tensor: SourceTensor) -> int:
    """In its file, whose order is the disk's."""
    place = getattr(tensor.tensor, "place", None)
    return (place[1] or 0) if place else 0
