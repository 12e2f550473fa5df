"""A model in any layout -> one quantised file, one part of the source at a time.

A part that is written may be deleted, one that is missing is waited for: what can be done is done, and a later run goes
on. Beyond the imports an expert's bytes lie in memory, or the largest dense tensor's, and the blocks they become.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import local

import torch
from torch import Tensor
from tqdm import tqdm

from fairseq_moe_ext.checkpoints.calibration_record import CalibrationRecord, read_calibration
from fairseq_moe_ext.checkpoints.conversion_lock import only_writer
from fairseq_moe_ext.checkpoints.errors import CheckpointError
from fairseq_moe_ext.checkpoints.kept_experts import KEPT, KeptExperts
from fairseq_moe_ext.checkpoints.kept_source import Keep, cut_model, cut_tensors, num_experts_of
from fairseq_moe_ext.checkpoints.quantization_source import (
    PartContent,
    Source,
    SourceModel,
    SourcePart,
    SourceTensor,
    digest,
)
from fairseq_moe_ext.checkpoints.quantized_about import QuantizedAbout, QuantizedSource
from fairseq_moe_ext.checkpoints.quantized_file import SUFFIX
from fairseq_moe_ext.checkpoints.quantized_layout import QuantizedLayout, QuantizedTensor, quantized_layout
from fairseq_moe_ext.checkpoints.quantized_writer import QuantizedWriter, begun_model, of_another
from fairseq_moe_ext.checkpoints.relative_error import error_of_layer, error_of_rounding
from fairseq_moe_ext.checkpoints.rounding import rows_in_dtype
from fairseq_moe_ext.checkpoints.state_keys import is_dense_matrix
from fairseq_moe_ext.checkpoints.two_at_a_time import two_at_a_time
from fairseq_moe_ext.experts.calibration import Calibration, correct_bias
from fairseq_moe_ext.experts.quantize import VERSION, fill_bias, quantize_linear
from fairseq_moe_ext.kernels.block import GROUP


@dataclass(frozen=True)
class Done:
    """errors: of each quantised matrix by its key, ||W - W~|| / ||W||. missing: the files that are waited for; empty
    where the file is complete."""

    errors: dict[str, float]
    missing: list[Path]


def quantize_checkpoint(
    source: Source,
    target: str,
    experts: str,
    dense: str,
    force: bool = False,
    calibrate: str | None = None,
    keep: Keep | None = None,
) -> Done:
    """Write what can be written of `source` into `target`, X.safetensors.

    experts: one of QUANTIZED; dense: one of DENSE. force: overwrite `target`, and begin anew where what an earlier run
    has left is of another source or other options. calibrate: a record's file, by which experts are quantised
    (experts/calibration.py). keep: whose experts are written alone; None: all. CheckpointError where a file is wrong,
    where one that is done has changed, without space, or where there is nothing to begin with.
    """
    file = _target(target)
    record = None if calibrate is None else read_calibration(calibrate)
    with only_writer(file):
        if file.exists() and not force:
            raise CheckpointError(f"{file}: it exists already: give --force to overwrite it")
        model = source.model() or begun_model(file, experts, dense)
        if model is None:
            raise CheckpointError(f"{source.path}: it waits for {source.waits_for()}, without which nothing can begin")
        if keep is not None and KEPT in model.state["extra_state"]:
            raise CheckpointError(
                f"{source.path}: it holds a pair's experts alone already: --keep needs the whole model"
            )
        if keep is not None and model.kept is None:
            model = cut_model(model, keep.of_model(num_experts_of(model)))
        elif model.kept != (None if keep is None else keep.of_model(num_experts_of(model))):
            raise of_another(file)
        return _Quantization(source, model, file, experts, dense, force, record).run()


def _kept_in(model: SourceModel) -> KeptExperts | None:
    """Whose experts the model has, which a record numbers as in the whole one: cut here, or pruned before."""
    pruned = model.state["extra_state"].get(KEPT)
    return model.kept if model.kept is not None or pruned is None else KeptExperts.from_json(pruned)


def _target(target: str) -> Path:
    file = Path(target)
    if file.suffix != SUFFIX or not file.stem or not file.parent.is_dir():
        raise CheckpointError(f"--output must be X{SUFFIX} in an existing folder, got {target}")
    return file


class _Room(local):
    """Each thread's memory for one of an expert's tensors and for its block, from one expert to the next."""

    def __init__(self, values: int, block: int):
        self.values, self.block = (torch.empty(size, dtype=torch.uint8) for size in (values, block))


@dataclass(frozen=True)
class _Filled:
    """What one tensor of the target was made of. room: its thread's, words: of the source's tensors; errors: as of
    `Done`; nbytes: read."""

    room: _Room
    words: list[str]
    errors: dict[str, float]
    nbytes: int

    def read(self, tensor: SourceTensor) -> Tensor:
        """Its values, until the next ones are read, whose word is kept."""
        values, word = tensor.read(self.room.values)
        self.words.append(word)
        return values


class _Quantization:
    def __init__(
        self,
        source: Source,
        model: SourceModel,
        file: Path,
        experts: str,
        dense: str,
        force: bool,
        record: CalibrationRecord | None,
    ):
        self._source, self._dense = source, dense
        try:
            self._layout = quantized_layout(model.shapes, model.aliases, experts, dense)
        except CheckpointError as error:
            raise CheckpointError(f"{source.path}: {error}") from error
        self._by_key, self._shapes, self._kept = self._layout.by_key(), model.shapes, model.kept
        self._record, self._numbers = record, _kept_in(model)
        if record is not None:
            record.check(self._layout, self._numbers)
        self._parts = source.parts(model.names)
        self._licence = model.licence
        about = _about(model, self._layout, experts, dense, None if record is None else record.fingerprint)
        tensors = [(each.name, each.dtype, each.shape) for each in self._layout.tensors.values()]
        fingerprint = _fingerprint(about, tensors, model.files)
        self._writer = QuantizedWriter(file, tensors, model.files, about, fingerprint, force)
        if force and self._changed():
            self._writer.discard()
            self._writer = QuantizedWriter(file, tensors, model.files, about, fingerprint, force)
        for key, values in model.constants.items():
            self._writer.write(self._by_key[key].name, [values])

    def run(self) -> Done:
        if (changed := self._changed()) is not None:
            raise CheckpointError(
                f"{changed}: it has changed since it was quantised into {self._writer.target}: the same file must be "
                "there, or none, or --force begins anew"
            )
        parts = [part for part in self._parts if not self._writer.is_done(part.name)]
        here = [part for part in parts if not part.missing]
        total = sum(size for part in here for _, size, _ in part.stamps())
        with tqdm(total=total, desc=f"quantising {self._source.path}", unit="B", unit_scale=True) as self._bar:
            for part in here:
                self._do(part)
        errors = {key: error for note in self._writer.notes.values() for key, error in note["errors"].items()}
        missing = [file for part in parts for file in part.missing]
        if not missing:
            self._complete()
        return Done(errors, missing)

    def _changed(self) -> Path | None:
        """The first file that is there and not what it was when its part was written."""
        for part in self._parts:
            if self._writer.is_done(part.name) and not part.missing:
                note = self._writer.notes[part.name]
                if part.stamps() == note["files"]:
                    continue
                words = [tensor.read()[1] for tensor in self._content(part).tensors]
                if digest(words) != note["fingerprint"]:
                    return part.files[0]
        return None

    def _do(self, part: SourcePart) -> None:
        stamps = part.stamps()
        content = self._content(part)
        told = {name: note["told"] for name, note in self._writer.notes.items()} | {part.name: content.told}
        self._source.check_told({each.name: told[each.name] for each in self._parts if each.name in told})
        groups: dict[str, list[SourceTensor]] = {}
        for tensor in content.tensors:
            groups.setdefault(self._checked(part, tensor).name, []).append(tensor)
        words: list[str] = []
        errors: dict[str, float] = {}
        for filled in self._fill_all(part, groups):
            words += filled.words
            errors |= filled.errors
            self._bar.update(filled.nbytes)
        if part.missing or part.stamps() != stamps:
            raise CheckpointError(f"{part.files[0]}: the file was changed while it was in use")
        note = {"files": stamps, "fingerprint": digest(words), "errors": errors, "told": content.told}
        self._writer.finish(part.name, note)
        self._bar.update(sum(size for _, size, _ in stamps) - sum(t.tensor.nbytes for t in content.tensors))

    def _content(self, part: SourcePart) -> PartContent:
        found = self._source.content(part)
        return found if self._kept is None else replace(found, tensors=list(cut_tensors(found.tensors, self._kept)))

    def _checked(self, part: SourcePart, tensor: SourceTensor) -> QuantizedTensor:
        """What the tensor becomes a part of."""
        if tensor.key not in self._by_key:
            raise CheckpointError(f"{part.files[0]}: {tensor.name} is no tensor of the model")
        if tuple(tensor.tensor.shape) != tuple(self._shapes[tensor.key]):
            raise CheckpointError(
                f"{part.files[0]}: {tensor.name} must be {tuple(self._shapes[tensor.key])} as in the rest of the "
                f"model, got {tuple(tensor.tensor.shape)}"
            )
        if not tensor.tensor.dtype.is_floating_point:
            raise CheckpointError(f"{part.files[0]}: {tensor.name} must be of floats, got {tensor.tensor.dtype}")
        return self._by_key[tensor.key]

    def _fill_all(self, part: SourcePart, groups: Mapping[str, list[SourceTensor]]) -> Iterator[_Filled]:
        """Two of the target's tensors at a time, so that one is read while another one is quantised, unless they would
        take more memory than an expert or the largest tensor."""
        largest = {name: max(each.tensor.nbytes for each in tensors) for name, tensors in groups.items()}
        most = max((sum(each.tensor.nbytes for each in tensors) for tensors in groups.values()), default=0)
        experts = [self._layout.tensors[name] for name in groups if self._layout.tensors[name].is_expert]
        room = _Room(
            max((largest[each.name] for each in experts), default=0), max((each.nbytes for each in experts), default=0)
        )
        work = {name: partial(self._fill, part, self._layout.tensors[name], groups[name], room) for name in groups}
        yield from two_at_a_time(work, largest, most)

    def _fill(
        self, part: SourcePart, target: QuantizedTensor, tensors: Sequence[SourceTensor], room: _Room
    ) -> _Filled:
        """All of `target` that is in this part."""
        filled = _Filled(room, [], {}, sum(tensor.tensor.nbytes for tensor in tensors))
        try:
            if target.is_expert:
                self._fill_expert(target, {tensor.key: tensor for tensor in tensors}, filled)
            else:
                for tensor in tensors:  # tied ones may be there under several names
                    self._fill_dense(target, tensor, filled)
        except ValueError as error:
            raise CheckpointError(f"{part.files[0]}: {error}") from error
        return filled

    def _fill_expert(self, target: QuantizedTensor, found: Mapping[str, SourceTensor], filled: _Filled) -> None:
        """One of its tensors at a time; others may come from another file."""
        block = filled.room.block[: target.nbytes].zero_()
        layers = target.block.layers(block[None])
        there = self._writer.begun(target.name)
        if there and not self._writer.read_begun(target.name, block) and self._record is not None:
            raise CheckpointError(  # of a bias and its correction one is lost in their sum
                f"{self._writer.target}: an earlier run was broken off while it wrote {target.name}, whose "
                "bias can no longer be told: --force begins anew"
            )
        calibration = Calibration(None, None) if self._record is None else self._record.of_expert(target, self._numbers)
        for number, key in sorted(enumerate(target.keys), key=lambda each: len(self._shapes[each[1]])):  # biases first
            if key not in found:
                continue
            layer, figures = layers[number // 2], (calibration.fc1, calibration.fc2)[number // 2]
            values = filled.read(found[key])
            if values.dim() == 2:
                quantize_linear(layer, values, None, "", (key, ""), None if figures is None else figures.square)
                if figures is not None:
                    correct_bias(layer, values, figures.mean)
                filled.errors[key] = error_of_layer(layer, values)
            elif figures is not None and target.keys[number - 1] in there:  # the weight has left a correction there
                correction = layer.bias.clone()
                fill_bias(layer, values, key)
                layer.bias.add_(correction)
            else:
                fill_bias(layer, values, key)
        there = [key for key in target.keys if key in there or key in found]
        if len(there) < len(target.keys):
            self._writer.write_begun(target.name, block, there)
        else:
            self._writer.write(target.name, [block])

    def _fill_dense(self, target: QuantizedTensor, tensor: SourceTensor, filled: _Filled) -> None:
        values = filled.read(tensor)
        if target.block is None:
            if not values.isfinite().all():
                raise ValueError(f"{tensor.name}: weights must be finite numbers, got a NaN or an infinity")
            pieces = rows_in_dtype(values, target.dtype, tensor.order, tensor.name, "--dense")
            self._writer.write(target.name, pieces)
            if is_dense_matrix(target.keys[0], target.shape) and values.dtype != target.dtype:
                filled.errors[tensor.key] = error_of_rounding(values, target.dtype)
            return
        block = torch.zeros(target.shape, dtype=torch.uint8)
        (layer,) = target.block.layers(block[None])
        quantize_linear(layer, values, None, "", (tensor.name, ""))
        filled.errors[tensor.key] = error_of_layer(layer, values)
        if tensor.order is not None:
            for plane in (layer.codes, layer.scales, layer.units):
                plane.copy_(plane[:, tensor.order])
        self._writer.write(target.name, [block])

    def _complete(self) -> None:
        notes = self._writer.notes
        files = {name: size for note in notes.values() for name, size, _ in note["files"]}
        names = [file.name for part in self._parts for file in part.files]
        fingerprint = digest([note["fingerprint"] for note in notes.values()])
        self._writer.set_source(QuantizedSource(fingerprint, tuple((n, files[n]) for n in names), self._licence))
        self._writer.complete()


def _about(
    model: SourceModel, layout: QuantizedLayout, experts: str, dense: str, calibrated: str | None
) -> QuantizedAbout:
    source = QuantizedSource("", tuple((name, 0) for name in model.names), model.licence)
    return QuantizedAbout(
        experts=experts,
        dense=dense,
        group=GROUP,
        quantizer=VERSION,
        source=source,
        calibrated=calibrated,
        aliases=layout.aliases,
        dims=layout.dims,
        state=model.state,
        kept=model.kept,
    )


def _fingerprint(about: QuantizedAbout, tensors: Sequence[tuple], files: Mapping[str, bytes]) -> str:
    """Of all but the weights."""
    shapes = sorted(f"{name} {dtype} {tuple(shape)}" for name, dtype, shape in tensors)
    contents = [f"{name} {digest([content.hex()])}" for name, content in files.items()]
    return digest([json.dumps(json.loads(about.as_json()), sort_keys=True), *shapes, *contents])
