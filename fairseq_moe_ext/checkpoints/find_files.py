"""Which files a `--path` means: one whole checkpoint, or upstream's shared file and rank files, or shards of either."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from fairseq_moe_ext.checkpoints.errors import CheckpointError

NAME = re.compile(r"(.+?)(-shared|-rank-\d+)?(-shard\d+)?\.pt")


@dataclass(frozen=True)
class CheckpointFiles:
    """The files of one checkpoint.

    whole: one file with everything in it, else None. shared: all but the experts; ranks: the experts, by rank.
    shards: upstream's `-shard{i}` files, by number, where `whole` or `shared` stands for them as the first.
    """

    whole: Path | None = None
    shared: Path | None = None
    ranks: tuple[Path, ...] = ()
    shards: tuple[Path, ...] = ()

    @property
    def first(self) -> Path:
        """The one that is always there: the whole file, or else the shared one."""
        found = self.whole or self.shared
        assert found is not None, "one of them is always there"
        return found


def find_checkpoint_files(path: str, flag: str = "--path") -> CheckpointFiles:
    """Take `X.pt`, or any one file of the checkpoint, alike; CheckpointError where a part is missing or doubled.

    A file that is exactly there as `X.pt` is whole. Otherwise, in this order: `X-shared.pt` and `X-rank-{r}.pt` beside
    each other; `X-shared-shard{i}.pt` and `X-rank-{r}-shard{r}.pt` (upstream's `--use-sharded-state`); `X-shard{i}.pt`.
    r and i run from 0 without a gap. flag: the option that names it, for messages.
    """
    given = Path(path)
    match = NAME.fullmatch(given.name)
    if match is None:
        if given.is_file():
            return CheckpointFiles(whole=given)
        raise CheckpointError(f"{flag} {path}: no such file")
    stem, part, shard = match.groups()
    if part is None and shard is None and given.is_file():
        return CheckpointFiles(whole=given)
    found = _Folder(path, stem, flag)
    if part is None and shard is not None:
        return found.whole_shards()
    if shard is None and (found.unsharded_exists() or part is not None and not found.sharded_exists()):
        return found.unsharded()
    if found.sharded_exists():
        return found.sharded()
    if part is None and found.numbered(r"-shard(\d+)", "shard"):
        return found.whole_shards()
    raise CheckpointError(f"{flag} {path}: there is neither {stem}.pt nor {stem}-shared.pt with {stem}-rank-0.pt")


def check_one_checkpoint(path: str) -> None:
    """CheckpointError where `--path` names an ensemble to a command that serves one model."""
    if os.pathsep in path and not os.path.exists(path):
        raise CheckpointError(f"--path must name one checkpoint to this command, got {path}")


class _Folder:
    """The files of the checkpoint called `stem` beside `path`."""

    def __init__(self, path: str, stem: str, flag: str):
        self._given, self._stem = f"{flag} {path}", stem
        self._folder = Path(path).parent

    def unsharded_exists(self) -> bool:
        return self._file("-shared").is_file() or bool(self.numbered(r"-rank-(\d+)", "rank"))

    def sharded_exists(self) -> bool:
        return bool(self.numbered(r"-shared-shard(\d+)", "shard") or self.numbered(r"-rank-(\d+)-shard\d+", "rank"))

    def unsharded(self) -> CheckpointFiles:
        shared, ranks = self._file("-shared"), self.numbered(r"-rank-(\d+)", "rank")
        if not ranks and not shared.is_file():
            raise CheckpointError(
                f"{self._given}: there is neither {self._stem}.pt nor {shared.name} with {self._stem}-rank-0.pt"
            )
        if not shared.is_file():
            raise CheckpointError(f"{self._given}: {len(ranks)} rank files but no {shared.name} beside them")
        if not ranks:
            raise CheckpointError(
                f"{self._given}: {shared.name} is there but no {self._stem}-rank-0.pt beside it"
            )
        return CheckpointFiles(shared=shared, ranks=self._without_gap(ranks, "rank", "-rank-{}"))

    def sharded(self) -> CheckpointFiles:
        shards = self.numbered(r"-shared-shard(\d+)", "shard")
        ranks = self.numbered(r"-rank-(\d+)-shard\d+", "rank")
        for kind, files in (("-shared-shard0", shards), ("-rank-0-shard0", ranks)):
            if not files:
                there = next(iter({**shards, **ranks}.values())).name
                raise CheckpointError(f"{self._given}: {there} is there but no {self._stem}{kind}.pt beside it")
        in_order = self._without_gap(shards, "shard", "-shared-shard{}")
        of_ranks = self._without_gap(ranks, "rank", "-rank-{0}-shard{0}")
        return CheckpointFiles(shared=in_order[0], ranks=of_ranks, shards=in_order)

    def whole_shards(self) -> CheckpointFiles:
        shards = self.numbered(r"-shard(\d+)", "shard")
        if not shards:
            raise CheckpointError(f"{self._given}: no such file")
        in_order = self._without_gap(shards, "shard", "-shard{}")
        return CheckpointFiles(whole=in_order[0], shards=in_order)

    def numbered(self, pattern: str, kind: str) -> dict[int, Path]:
        """The files whose name is the stem and `pattern`, whose one group is their number."""
        name = re.compile(re.escape(self._stem) + pattern + r"\.pt")
        files: dict[int, Path] = {}
        for file in sorted(self._folder.glob("*.pt")) if self._folder.is_dir() else ():
            match = name.fullmatch(file.name)
            if match is None:
                continue
            number = int(match.group(1))
            if number in files:
                raise CheckpointError(
                    f"{self._given}: {kind} {number} must stand in one file, "
                    f"found {files[number].name} and {file.name}"
                )
            files[number] = file
        return files

    def _file(self, part: str) -> Path:
        return self._folder / f"{self._stem}{part}.pt"

    def _without_gap(self, files: dict[int, Path], kind: str, part: str) -> tuple[Path, ...]:
        # a file's name can hold any number
        missing = list(islice((number for number in range(max(files) + 1) if number not in files), 4))
        if missing:
            names = ", ".join(self._file(part.format(number)).name for number in missing)
            raise CheckpointError(
                f"{self._given}: {kind} files must run from 0 to {max(files)} with no gap; missing {names}"
            )
        return tuple(files[number] for number in sorted(files))
