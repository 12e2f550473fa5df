"""Damaged checkpoint files, thousands of them: each ends in a CheckpointError or in the right state, none runs code.

A flipped bit anywhere is found by the archive's checksums, or lies where nothing is read; files of the old format have
no checksums, so that there only their structure is put to the test. Every tensor's bits are compared.
"""

from __future__ import annotations

import io
import pickle
import random
import shutil
from collections import Counter
from pathlib import Path

import commands
import pytest
import torch
from checkpoint_makers import proving_state, split, whole

from fairseq_moe_ext.checkpoints.checkpoint import read_checkpoint
from fairseq_moe_ext.checkpoints.errors import CheckpointError
from fairseq_moe_ext.serving import fairseq_hooks

FILES = ("X-shared.pt", "X-rank-0.pt", "X-rank-1.pt")
EXPERTS = 2


def content(model: dict) -> dict:
    cfg = {"model": {"_name": "transformer_lm"}, "distributed_training": {"distributed_rank": 0}}
    return whole(model, cfg=cfg, optimizer_history=[{"num_updates": 7, "criterion_name": "x", "optimizer_name": "y"}])


@pytest.fixture
def pristine(tmp_path) -> tuple[Path, dict[str, bytes], list]:
    """(folder with a checkpoint of three files and one of one, their bytes, what they say)."""
    folder = tmp_path / "checkpoint"
    split(proving_state(EXPERTS), 2, folder, template=content)
    file = folder / "X-rank-1.pt"
    state = commands.read_state(file)
    state["cfg"]["distributed_training"]["distributed_rank"] = 1
    torch.save(state, file)
    torch.save(content(proving_state(EXPERTS)), folder / "one.pt")
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    return folder, files, said(folder / "X.pt")


def said(path: Path) -> list:
    """All that serving takes from a checkpoint, tensors as their bits."""
    state = read_checkpoint(str(path))
    model = {key: tensor.detach().numpy().tobytes() for key, tensor in state["model"].items()}
    return [sorted(model.items()), pickle.dumps([state.get(key) for key in ("cfg", "args", "optimizer_history")])]


class Outcomes(Counter):
    """Counts how cases end; a case that ends otherwise fails the test."""

    def try_out(self, path: Path, wanted: list, case: str) -> None:
        try:
            found = said(path)
        except CheckpointError as error:
            assert "\n" not in str(error) and len(str(error)) < 1500, case
            assert path.name.partition(".")[0] in str(error), f"{case}: {error}"
            self["named error"] += 1
        except Exception as error:
            raise AssertionError(f"{case}: ended in {error!r}") from error
        else:
            assert found == wanted, f"{case}: served wrong"
            self["right"] += 1


def damaged(files: dict[str, bytes], number: int, seed: int):
    """`number` cases (name, bytes, description): cut off, a bit flipped, bytes overwritten, moved or doubled."""
    draw = random.Random(seed)
    names = [*FILES, "one.pt"]
    for index in range(number):
        name = names[index % len(names)]
        data = bytearray(files[name])
        kind = draw.choice(("flip", "flip", "flip", "zeros", "noise", "insert", "remove", "cut"))
        place, length = draw.randrange(len(data)), draw.choice((1, 2, 8, 100))
        if kind == "flip":
            data[place] ^= 1 << draw.randrange(8)
        elif kind == "zeros":
            data[place : place + length] = bytes(len(data[place : place + length]))
        elif kind == "noise":
            data[place : place + length] = draw.randbytes(len(data[place : place + length]))
        elif kind == "insert":
            data[place:place] = draw.randbytes(length)
        elif kind == "remove":
            del data[place : place + length]
        else:
            del data[place:]
        yield name, bytes(data), f"{name}: {kind} of {length} at {place} (seed {seed}, case {index})"


def run_damaged(pristine, number: int, seed: int) -> Outcomes:
    folder, files, wanted = pristine
    outcomes = Outcomes()
    for name, data, case in damaged(files, number, seed):
        (folder / name).write_bytes(data)
        outcomes.try_out(folder / ("one.pt" if name == "one.pt" else "X.pt"), wanted, case)
        (folder / name).write_bytes(files[name])
    return outcomes


def test_random_damage_is_a_named_error_or_harmless(pristine):
    outcomes = run_damaged(pristine, 300, seed=1)
    assert sum(outcomes.values()) == 300 and outcomes["named error"] > 180


@pytest.mark.slow
def test_random_damage_6000_times(pristine):
    outcomes = run_damaged(pristine, 6000, seed=2)
    assert sum(outcomes.values()) == 6000 and outcomes["named error"] > 3600
    print(dict(outcomes))


@pytest.mark.parametrize("step", [1000, pytest.param(100, marks=pytest.mark.slow)])
def test_cut_off_at_every_step(pristine, step):
    folder, files, wanted = pristine
    outcomes = Outcomes()
    for name in files:
        for size in range(0, len(files[name]), step):
            (folder / name).write_bytes(files[name][:size])
            outcomes.try_out(folder / ("one.pt" if name == "one.pt" else "X.pt"), wanted, f"{name} cut off at {size}")
        (folder / name).write_bytes(files[name])
    assert outcomes["right"] == 0 and outcomes["named error"] > 20


@pytest.mark.slow
def test_every_byte_of_what_describes_an_archive(pristine):
    folder, files, wanted = pristine
    outcomes = Outcomes()
    data = files["X-rank-1.pt"]
    start = data.index(b"PK\x01\x02")  # the directory at the end, and before it the pickle at the beginning
    for place in [*range(0, 600), *range(start, len(data))]:
        (folder / "X-rank-1.pt").write_bytes(data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :])
        outcomes.try_out(folder / "X.pt", wanted, f"byte {place} turned")
    print(dict(outcomes))


def test_every_bit_of_every_weight_counts(pristine):
    folder, files, wanted = pristine
    outcomes = Outcomes()
    data = files["X-rank-1.pt"]
    value = torch.full((5, 3), 101.0).numpy().tobytes()
    start = data.index(value)
    for place in range(start, start + len(value)):
        (folder / "X-rank-1.pt").write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        outcomes.try_out(folder / "X.pt", wanted, f"bit of byte {place} flipped")
    assert outcomes == {"named error": len(value)}


def test_files_in_each_others_place(pristine):
    folder, files, wanted = pristine
    outcomes = Outcomes()
    for name in FILES:
        for other in files:
            shutil.copy(folder / other, folder / "other")
            (folder / name).write_bytes(files[other])
            if files[name] != files[other]:
                outcomes.try_out(folder / "X.pt", wanted, f"{other} in the place of {name}")
            (folder / name).write_bytes(files[name])
    (folder / "X-rank-0.pt").write_bytes(files["X-rank-1.pt"])
    (folder / "X-rank-1.pt").write_bytes(files["X-rank-0.pt"])
    outcomes.try_out(folder / "X.pt", wanted, "ranks swapped")
    print(dict(outcomes))


def test_keys_left_out(pristine):
    """In the rank files, any key; in the shared one, where a missing tensor is the model's to find, the gates."""
    folder, files, wanted = pristine
    outcomes = Outcomes()
    for name in FILES:
        state = commands.read_state(folder / name)
        for key in state["model"]:
            if name == "X-shared.pt" and ".gate." not in key:
                continue
            less = {other: tensor for other, tensor in state["model"].items() if other != key}
            torch.save({**state, "model": less}, folder / name)
            outcomes.try_out(folder / "X.pt", wanted, f"{name} without {key}")
        (folder / name).write_bytes(files[name])
    assert outcomes["right"] == 0


def test_parts_of_a_file_left_out_or_replaced(pristine):
    """Through fairseq's hook, which also upgrades what it read."""
    folder, files, _ = pristine
    fairseq_hooks.install()
    load = fairseq_hooks.checkpoint_utils.load_checkpoint_to_cpu
    values = (None, 3, "text", [], {}, [1], torch.ones(2), {"model": 1})
    cases = 0
    state = commands.read_state(folder / "one.pt")
    for key in state:
        for value in ("left out", *values):
            changed = {name: part for name, part in state.items() if name != key}
            if not isinstance(value, str) or value != "left out":
                changed[key] = value
            torch.save(changed, folder / "one.pt")
            try:
                load(fairseq_hooks.ServedPath(folder / "one.pt"))
            except CheckpointError as error:
                assert "one.pt" in str(error) and "\n" not in str(error)
            except Exception as error:
                raise AssertionError(f"{key} = {value!r}: ended in {error!r}") from error
            cases += 1
    assert cases > 60
    (folder / "one.pt").write_bytes(files["one.pt"])


@pytest.mark.parametrize("number", [60, pytest.param(1500, marks=pytest.mark.slow)])
def test_damage_to_the_old_format(tmp_path, number):
    """It has no checksums: a weight may be wrong, but nothing else than a CheckpointError may come of it."""
    buffer = io.BytesIO()
    torch.save(content(proving_state(EXPERTS)), buffer, _use_new_zipfile_serialization=False)
    files = dict.fromkeys([*FILES, "one.pt"], buffer.getvalue())
    for _, data, case in damaged(files, number, seed=3):
        (tmp_path / "X.pt").write_bytes(data)
        try:
            said(tmp_path / "X.pt")
        except CheckpointError as error:
            assert "X.pt" in str(error) and "\n" not in str(error)
        except Exception as error:
            raise AssertionError(f"{case}: ended in {error!r}") from error
