"""What a checkpoint may hold besides tensors, and that a refusal names the class and the file."""

from __future__ import annotations

import argparse
import collections
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_makers import proving_state, whole
from fairseq import checkpoint_utils
from fairseq.data.multilingual.multilingual_utils import EncoderLangtok, LangTokStyle
from fairseq.dataclass import constants
from omegaconf import DictConfig, OmegaConf
from small_lm import small_lm

from fairseq_moe_ext.checkpoints.checkpoint import read_checkpoint
from fairseq_moe_ext.checkpoints.errors import CheckpointError
from fairseq_moe_ext.serving import fairseq_hooks


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    return small_lm(tmp_path_factory.mktemp("lm"))


def content_with(value) -> dict:
    return whole(proving_state(2), extra_state={"value": value})


def loaded(value, path: Path):
    torch.save(content_with(value), path)
    return read_checkpoint(str(path))["extra_state"]["value"]


@pytest.mark.parametrize(
    "value",
    [
        argparse.Namespace(a=1, b=[None, "x"], c=argparse.Namespace(d=2.5)),
        collections.OrderedDict(a=1),
        {"set": {1, 2}, "bytes": b"abc", "complex": 1j},
        *(np.array(value, dtype=dtype)[()] for value, dtype in ((1.5, "f8"), (1.5, "f4"), (1.5, "f2"), (True, "?"))),
        *(np.array(value, dtype=dtype)[()] for value, dtype in ((-3, "i8"), (3, "u1"), (1j, "c8"), (1.5, ">f8"))),
        *(np.str_(value) for value in ("text", "")),
        np.bytes_(b"text"),
        *(np.dtype(name) for name in ("f8", "<f4", ">i2", "?", "U7", "S3", "u8", "c16")),
        {"dtypes": [np.dtype("f4")], "in a namespace": argparse.Namespace(dtype=np.dtype("i4"))},
        OmegaConf.create({"a": 1, "b": [1, 2.5, None, True, "x", b"y"], "c": {"d": "${a}"}}),
        OmegaConf.create([1, {"a": "b"}]),
        EncoderLangtok.src,
        argparse.Namespace(style=LangTokStyle.multilingual),
    ],
    ids=str,
)
def test_what_a_checkpoint_may_hold(tmp_path, value):
    found = loaded(value, tmp_path / "X.pt")
    assert type(found) is type(value)
    assert found == value
    if isinstance(value, DictConfig):
        assert found.c.d == 1
    if isinstance(value, np.generic | np.dtype):
        assert getattr(found, "dtype", found).str == getattr(value, "dtype", value).newbyteorder("=").str or (
            isinstance(value, np.dtype) and found.str == value.str
        )


def test_a_defaultdict_is_read_as_a_plain_one(tmp_path):
    assert loaded(collections.defaultdict(list, a=[1]), tmp_path / "X.pt") == {"a": [1]}


def rename_in_pickle(path: Path, old: bytes, new: bytes) -> None:
    """Write the archive anew with other names in its pickle; lengths may differ."""
    with zipfile.ZipFile(path) as archive:
        content = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in content.items():
            archive.writestr(name, data.replace(old, new) if name.endswith("data.pkl") else data)


def test_numpy_2s_name_of_its_scalars(tmp_path):
    content = content_with(np.float64(2.5))
    content["model"] = {}  # the archive's records move
    torch.save(content, tmp_path / "X.pt")
    rename_in_pickle(tmp_path / "X.pt", b"numpy.core.multiarray", b"numpy._core.multiarray")
    with zipfile.ZipFile(tmp_path / "X.pt") as archive:
        assert b"cnumpy._core.multiarray\nscalar" in archive.read(archive.namelist()[0])
    assert read_checkpoint(str(tmp_path / "X.pt"))["extra_state"]["value"] == 2.5


def test_choices_of_fairseq_cannot_get_into_a_file(tmp_path):
    with pytest.raises(Exception, match="Choices"):
        torch.save(content_with(next(iter(constants.DDP_BACKEND_CHOICES))), tmp_path / "X.pt")


class Unknown:
    pass


class MakesArray:
    """numpy's constructor called with a type that holds pointers: bytes of the file would become an address."""

    def __reduce__(self):
        return np.core.multiarray.scalar, (np.dtype("O"), b"12345678")


class StructuredType:
    def __reduce__(self):
        return np.dtype, ([("a", "O")],)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (Unknown(), "Unknown"),
        (Path("/tmp"), "Path"),
        (os.system, "system"),
        (eval, "eval"),
        (np.ones(2), "_reconstruct"),
        (np.datetime64("2020-01-01"), "numpy.dtype must be of numbers or strings, got 'M8'"),
        (StructuredType(), "numpy.dtype must be of numbers or strings"),
        (MakesArray(), "numpy.dtype must be of numbers or strings, got 'O8'"),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),  # no addresses: names must not change
)
@pytest.mark.parametrize("new_format", [True, False])
def test_a_refusal_names_the_class_and_the_file(tmp_path, value, words, new_format):
    torch.save(content_with(value), tmp_path / "X.pt", _use_new_zipfile_serialization=new_format)
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(str(tmp_path / "X.pt"))
    message = str(caught.value)
    assert "\n" not in message and str(tmp_path / "X.pt") in message and words in message, message


def test_reading_through_fairseq_itself_uses_the_list_too(lm, tmp_path):
    _, content = lm
    extra = {**content["extra_state"], "best": np.float64(2.5), "bare": (np.dtype(">f4"),)}
    torch.save({**content, "extra_state": extra}, tmp_path / "X.pt")
    fairseq_hooks.install()
    state = checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "X.pt"))  # as training goes on
    assert state["extra_state"]["best"] == 2.5 and state["extra_state"]["bare"] == (np.dtype(">f4"),)
    assert state["model"].keys() == content["model"].keys()
