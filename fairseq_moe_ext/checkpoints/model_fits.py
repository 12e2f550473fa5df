"""Whether a checkpoint's tensors fit the model that its configuration describes, before that model takes memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from fairseq.models import ARCH_MODEL_REGISTRY, MODEL_REGISTRY
from fairseq.models.transformer import TransformerModel
from fairseq.models.transformer_align import TransformerAlignModel
from fairseq.models.transformer_lm import TransformerLanguageModel
from fairseq.modules.sinusoidal_positional_embedding import SinusoidalPositionalEmbedding
from torch import nn
from torch.overrides import TorchFunctionMode

from fairseq_moe_ext.checkpoints.errors import CheckpointError, one_line
from fairseq_moe_ext.checkpoints.loading import ModelState, check_vocabulary, loading_into

_DENSE = (TransformerModel, TransformerAlignModel, TransformerLanguageModel)
_ONE_AT_A_TIME = threading.Lock()  # who replaces a function of fairseq's
_FIELDS_AS_FLAGS = ("--share-", "--quant-noise-")  # fairseq's and our layers' errors call a model's fields so


def load_in_one_sentence(model: nn.Module) -> None:
    """Let a model of fairseq's own load a ModelState as ours do: what is wrong with it is a CheckpointError."""
    load = model.load_state_dict

    def load_state_dict(state_dict, *args, **kwargs):
        del model.load_state_dict  # for one call, and no model refers to itself
        with loading_into(model, state_dict):
            return load(state_dict, *args, **kwargs)

    model.load_state_dict = load_state_dict


def dense_model(name: str | None) -> type | None:
    """The class in fairseq of a dense checkpoint's architecture, None where fairseq does not know the name.

    ValueError where it is of another family than transformer and transformer_lm: those run code of other kinds.
    """
    found = ARCH_MODEL_REGISTRY.get(name) or MODEL_REGISTRY.get(name)
    if found is not None and found not in _DENSE and not found.__module__.startswith("fairseq_moe_ext."):
        raise ValueError(
            f"a dense checkpoint's architecture must be of fairseq's families transformer or transformer_lm, got {name}"
        )
    return found


class WithoutNormalValues(TorchFunctionMode):
    """In this context tensors without memory are not filled with normally distributed values."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.Tensor.normal_, nn.init.normal_):
            tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta:
                return tensor
        return function(*args, **(kwargs or {}))


@contextmanager
def _without_memory() -> Iterator[None]:
    """Tensors made in this context have no memory, and a model not the values that it begins with.

    On tensors without memory PyTorch computes some values in Python, for which it imports its compiler: 150 MB and a
    second. Other threads' models have their values meanwhile.
    """
    sinusoidal = SinusoidalPositionalEmbedding
    with _ONE_AT_A_TIME:
        get_embedding, here = sinusoidal.get_embedding, threading.get_ident()

        def without_values(rows: int, dim: int, padding_idx: int | None = None) -> torch.Tensor:
            if threading.get_ident() != here:
                return get_embedding(rows, dim, padding_idx)
            return torch.empty(rows, dim)

        sinusoidal.get_embedding = staticmethod(without_values)
        try:
            with torch.device("meta"), WithoutNormalValues():
                yield
        finally:
            sinusoidal.get_embedding = staticmethod(get_embedding)


@contextmanager
def naming_the_checkpoint(state: ModelState | None) -> Iterator[None]:
    """A ValueError in this context that speaks of the checkpoint, not of a flag, names its file."""
    try:
        yield
    except ValueError as error:
        is_of_a_flag = str(error).startswith("--") and not str(error).startswith(_FIELDS_AS_FLAGS)
        if state is not None and not is_of_a_flag:
            error.args = (f"{state.loading.path}: {error}",)
        raise


def check_fits(build: Callable[[], nn.Module], state: ModelState | None) -> None:
    """CheckpointError unless `build`'s model has tensors as `state` has them, and no more values.

    It is built without memory. A state's keys may have older names, so that those which lack are found in loading.
    state: None where a model is built that no checkpoint will fill.
    """
    if state is None:
        return
    path = state.loading.path
    try:
        with _without_memory():
            model = build()
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        raise CheckpointError(f"{path}: its configuration describes no model: {one_line(error)}") from error
    for name, tensor in state.items():
        if tensor.dtype.is_complex:  # a parameter would take the real parts, and say nothing
            raise CheckpointError(f"{path}: its tensors must be of real numbers, {name} is {tensor.dtype}")
    check_vocabulary(model, state)
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if name in state and state[name].shape != parameter.shape:
            raise CheckpointError(
                f"{path}: its tensors must fit the model that its configuration describes: size mismatch for {name}: "
                f"{tuple(state[name].shape)} in the checkpoint, {tuple(parameter.shape)} in the model"
            )
    wanted = sum(parameter.numel() for parameter in parameters.values())
    found = sum(tensor.numel() for tensor in state.values())
    if wanted > found:
        raise CheckpointError(
            f"{path}: its tensors must fit the model that its configuration describes: it has {wanted:,} values, the "
            f"tensors have {found:,}"
        )
