"""What a checkpoint is, in a few lines, by the names and shapes of its tensors: no weight is read.

Legend: E = experts, D = model dim, F = hidden dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fairseq_moe_ext.checkpoints.checkpoint import read_checkpoint
from fairseq_moe_ext.checkpoints.errors import CheckpointError
from fairseq_moe_ext.checkpoints.find_files import CheckpointFiles, find_checkpoint_files
from fairseq_moe_ext.checkpoints.kept_experts import KeptExperts
from fairseq_moe_ext.checkpoints.quantized_about import QuantizedAbout
from fairseq_moe_ext.checkpoints.state_keys import expert_counts, is_expert_key, layer_count, moe_layer_numbers
from fairseq_moe_ext.checkpoints.stored_tensor import StoredTensor
from fairseq_moe_ext.experts.block_part import BlockPart


@dataclass(frozen=True)
class CheckpointSummary:
    """layers, moe_layers: by side. What a model lacks is 0. Bytes are counted as they lie in the files. about: what a
    quantised checkpoint says of itself. kept: of a pruned one, whose experts are those of its largest layer."""

    files: CheckpointFiles
    architecture: str
    layers: dict[str, int]
    moe_layers: dict[str, list[int]]
    experts: int
    model_dim: int
    hidden_dim: int
    vocabulary: int
    dtypes: dict[str, int]
    parameters: int
    bytes: int
    expert_bytes: int
    has_optimizer: bool
    about: QuantizedAbout | None = None
    kept: KeptExperts | None = None

    def __str__(self) -> str:
        lines = [f"files         {_describe(self.files)}", f"architecture  {self.architecture}"]
        for side, number in self.layers.items():
            where = ", ".join(map(str, self.moe_layers[side]))
            lines.append(f"{side:14}{number} layers" + (f", MoE layers {where} (from 0)" if where else ""))
        if self.experts:
            most = "at most " if self.kept is not None and len(set(self.kept.counts.values())) > 1 else ""
            lines.append(f"experts       {most}{self.experts} in each MoE layer, model dim {self.model_dim}, ")
            lines[-1] += f"hidden dim {self.hidden_dim}"
        dtypes = ", ".join(f"{name} {count:,}" for name, count in self.dtypes.items())
        lines += [
            f"vocabulary    {self.vocabulary:,}",
            f"parameters    {self.parameters:,}: {dtypes}",
            f"bytes         {self.bytes:,}, of them {self.expert_bytes:,} in experts",
            f"optimizer     {'its state is in the files' if self.has_optimizer else 'no state'}",
        ]
        if self.kept is not None:
            lines.append(f"kept          {_kept_in_words(self.kept)}")
        if self.about is not None:
            lines += _lines_of(self.about)
        return "\n".join(lines)


def _lines_of(about: QuantizedAbout) -> list[str]:
    source, calibrated = about.source, "" if about.calibrated is None else ", calibrated"
    return [
        f"quantised     experts in {about.experts}, dense layers in {about.dense}, groups of {about.group}{calibrated}",
        f"source        {len(source.files)} files of {sum(size for _, size in source.files):,} bytes, fingerprint "
        f"{source.fingerprint}",
        f"licence       {source.licence or 'the source does not say'}",
    ]


def _kept_in_words(kept: KeptExperts) -> str:
    counts = [
        f"{sum(len(numbers) for numbers in layers)} of {kept.num_experts * len(layers)} experts of the {side}"
        + f", for {language}" * bool(language)
        for side, language in zip(("encoder", "decoder"), kept.languages, strict=True)
        if (layers := [numbers for name, numbers in kept.layers.items() if name.startswith(side)])
    ]
    return "; ".join(counts)


def summarize(path: str) -> CheckpointSummary:
    """The summary of the checkpoint at `path`; CheckpointError as `read_checkpoint`."""
    state = read_checkpoint(path)
    model = state["model"]
    once = {place_of(tensor): (key, tensor) for key, tensor in reversed(model.items())}.values()
    dtypes: dict[str, int] = {}
    for _, tensor in once:
        name = tensor.format_name if isinstance(tensor, BlockPart) else str(tensor.dtype).removeprefix("torch.")
        dtypes[name] = dtypes.get(name, 0) + tensor.numel()
    sides = {side: layer_count(model, side) for side in ("encoder", "decoder")}
    hidden_dim, model_dim = _matrix(path, model, ".moe_layer.experts.0.fc1.weight")
    vocabulary, _ = _matrix(path, model, "embed_tokens.weight")
    return CheckpointSummary(
        files=find_checkpoint_files(path),
        architecture=_architecture(state),
        layers={side: number for side, number in sides.items() if number},
        moe_layers={side: moe_layer_numbers(model, side) for side in sides},
        experts=max(expert_counts(model).values(), default=0),
        model_dim=model_dim,
        hidden_dim=hidden_dim,
        vocabulary=vocabulary,
        dtypes=dtypes,
        parameters=sum(tensor.numel() for _, tensor in once),
        bytes=sum(tensor.nbytes for _, tensor in once),
        expert_bytes=sum(tensor.nbytes for key, tensor in once if is_expert_key(key)),
        has_optimizer=model.had_optimizer,
        about=model.about,
        kept=model.kept,
    )


def _matrix(path: str, model: dict[str, Tensor], ending: str) -> tuple[int, int]:
    """The shape of the first tensor whose key ends so; (0, 0) where there is none."""
    key = next((key for key in model if key.endswith(ending)), None)
    shape = (0, 0) if key is None else tuple(model[key].shape)
    if len(shape) != 2:
        raise CheckpointError(f"{path}: {key} must have 2 dims, got {shape}")
    return shape


def place_of(tensor: Tensor) -> tuple:
    """Equal for two tensors that are the same values in the same place."""
    is_stored = isinstance(tensor, StoredTensor | BlockPart)
    return tensor.place if is_stored else (tensor.data_ptr(), tensor.shape, tensor.dtype)


def model_field(state: dict[str, Any], name: str) -> Any:
    """A field of the model's configuration as the checkpoint has it; None where it does not say."""
    cfg = state.get("cfg")
    model = cfg.get("model") if hasattr(cfg, "keys") else state.get("args")
    return model.get(name) if hasattr(model, "keys") else getattr(model, name, None)


def _architecture(state: dict[str, Any]) -> str:
    return str(model_field(state, "_name") or model_field(state, "arch") or "unknown")[:80]


def _describe(files: CheckpointFiles) -> str:
    if files.ranks:
        shards = f" in {len(files.shards)} shards" if files.shards else ""
        return f"{files.first.name}{shards} and {len(files.ranks)} rank files"
    return f"{files.first.name}" + (f" and {len(files.shards) - 1} more shards" if files.shards else "")
