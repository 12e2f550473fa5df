"""What serving a model takes in device memory, main memory and disk, from its tensors' shapes, and the flags to use.

Legend: E = experts of a layer, N = experts of a layer in a buffer, R = ranks. Bytes throughout. An estimate: weights
are exact, what a batch needs is the decoder's caches, the scores over the vocabulary and a lump sum. Weights for a GPU
pass through main memory, where fairseq makes the model. On disk lies the checkpoint, in its own dtype; `--expert-store
disk` reads it, too, or with quantised experts a store beside it.
"""

from __future__ import annotations

import math
import re
from argparse import Namespace
from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY
from tabulate import tabulate
from torch import Tensor

from fairseq_moe_ext.buffering.slot_pool import STAGING_SLOTS
from fairseq_moe_ext.checkpoints.checkpoint import read_checkpoint
from fairseq_moe_ext.checkpoints.checkpoint_summary import model_field, place_of
from fairseq_moe_ext.checkpoints.errors import CheckpointError
from fairseq_moe_ext.checkpoints.state_keys import EXPERT_KEY
from fairseq_moe_ext.experts.formats import DENSE, FLOAT, format_named
from fairseq_moe_ext.experts.parts import EXPERT_KEYS
from fairseq_moe_ext.nllb.config import NllbConfig
from fairseq_moe_ext.nllb.hf_folder import HfFolder
from fairseq_moe_ext.nllb.hf_model import match_tensors
from fairseq_moe_ext.nllb.names import named_tensors
from fairseq_moe_ext.serving.weight_reads import DenseWeights, Reads, reads_of

USABLE = 0.95  # of a device's memory: the rest is fragments
PROCESS = 2_000_000_000  # Python, PyTorch and, on a GPU, its context
CPU_PLACES = 8  # N on a CPU where nothing else is asked for
_VOCABULARY_KEYS = ("embed_tokens.weight", "output_projection.weight")


@dataclass(frozen=True)
class ModelSizes:
    """In elements. dense: all but experts; expert: one of a layer; moe_layers and experts: how many, of a pruned model
    in its largest layer; kept: of a pruned model whose layers are unlike each other, the experts of all layers.

    vocabulary: what a step has scores for. file_bytes: of the tensors as they are stored; None: there is no file.
    expert_dims: model dim and hidden dim of such an expert, which quantised ones need. weights: what `dense` counts.
    encoder, decoder: what a pass and a step read. choices: of a token. quantized: of a quantised checkpoint, its
    experts' format and whether its dense part lies in int8.
    """

    dense: int
    expert: int
    moe_layers: int
    experts: int
    decoder_layers: int
    model_dim: int
    vocabulary: int
    file_bytes: int | None = None
    expert_dims: tuple[int, int] | None = field(default=None, compare=False)
    weights: DenseWeights = field(default=DenseWeights(), compare=False)
    encoder: Reads | None = field(default=None, compare=False)
    decoder: Reads | None = field(default=None, compare=False)
    choices: int = field(default=2, compare=False)
    quantized: tuple[str, bool] | None = None
    kept: int | None = None

    @classmethod
    def of_shapes(
        cls, shapes: Mapping[str, tuple[int, ...]], file_bytes: int | None = None, choices: int = 2
    ) -> ModelSizes:
        """shapes: of a state in fairseq's names, a tensor that has several of them under one."""
        embeddings = [shape for key, shape in shapes.items() if key.endswith(_VOCABULARY_KEYS)]
        if not embeddings:
            raise CheckpointError("a model must have embed_tokens.weight")
        vocabulary, model_dim = embeddings[-1]  # the decoder's
        sizes: dict[tuple[str, int], int] = {}
        dims = (0, 0)
        for name, shape in shapes.items():
            match = EXPERT_KEY.match(name)
            if match:
                place = match.group(1), int(match.group(2))
                sizes[place] = sizes.get(place, 0) + math.prod(shape)
                if name.endswith(EXPERT_KEYS["fc1_weight"]):
                    dims = max(dims, (shape[1], shape[0]), key=math.prod)
        dense = DenseWeights.of_shapes({name: shape for name, shape in shapes.items() if not EXPERT_KEY.match(name)})
        layers = Counter(layer for layer, _ in sizes)
        experts = max(layers.values(), default=0)
        sides = {
            side: reads_of(side, shapes, (vocabulary, model_dim))
            for side in ("encoder", "decoder")
            if any(name.startswith(f"{side}.layers.") for name in shapes)
        }
        numbers = re.compile(r"decoder\.layers\.(\d+)\.")
        return cls(
            dense=dense.elements,
            expert=max(sizes.values(), default=0),
            moe_layers=len(layers),
            experts=experts,
            decoder_layers=len({match.group(1) for match in map(numbers.match, shapes) if match}),
            model_dim=model_dim,
            vocabulary=vocabulary,
            file_bytes=file_bytes,
            expert_dims=dims if layers else None,
            weights=dense,
            encoder=sides.get("encoder"),
            decoder=sides.get("decoder"),
            choices=choices,
            kept=None if len(sizes) == experts * len(layers) else len(sizes),
        )

    @property
    def all_experts(self) -> int:
        """Of all layers together."""
        return self.experts * self.moe_layers if self.kept is None else self.kept

    @property
    def parameters(self) -> int:
        """How many, in the dense part and all experts."""
        return self.dense + self.expert * self.all_experts

    def expert_bytes(self, weights: str, element: int) -> int:
        """Of an expert in a format of FORMATS, or as floats of `element` bytes."""
        if weights == FLOAT or self.expert_dims is None:
            return self.expert * element
        return format_named(weights, *self.expert_dims).expert_bytes(torch.float32)

    def encoder_alone(self, room: int, a_place: int) -> tuple[int, int] | None:
        """With all of the decoder's experts resident and `room` bytes for experts: places of a buffer in each of the
        encoder's layers, and the bytes that all of it takes; None where that is no whole place.

        a_place: bytes of an expert in every layer.
        """
        if self.encoder is None or self.decoder is None or not self.encoder.moe_layers:
            return None
        expert = a_place // self.moe_layers
        resident, a_place = expert * self.decoder.moe_layers * self.decoder.experts, expert * self.encoder.moe_layers
        resident += STAGING_SLOTS * expert
        places = min((room - resident) // a_place, self.encoder.experts)
        return None if places < 1 else (places, resident + places * a_place)

    def dense_bytes(self, element: int, int8: bool = False) -> int:
        """Of all but experts as floats of `element` bytes; int8: but for what `--moe-weights-scope all` quantises."""
        return self.weights.bytes(element, int8) if int8 else self.dense * element


@dataclass(frozen=True)
class Workload:
    """What is served at a time: sentences, hypotheses of each, tokens of source and target; bytes of an element."""

    batch: int = 16
    beam: int = 4
    length: int = 128
    element: int = 2

    def bytes(self, sizes: ModelSizes) -> int:
        """An estimate of caches and scores for one batch, in bytes."""
        rows = self.batch * self.beam
        tokens = rows * self.length
        caches = 4 * sizes.decoder_layers * tokens * sizes.model_dim * self.element  # own and encoder's k, v
        return caches + 2 * 4 * rows * sizes.vocabulary  # scores and their log-softmax, float32


@dataclass(frozen=True)
class Setting:
    """device: per GPU. fits: whether there is so much, and if not, why; flags: of fairseq-generate. places: experts of
    a layer in a buffer."""

    name: str
    device: int
    host: int
    disk: int
    fits: bool
    flags: str
    why: str = ""
    places: int | None = None


def read_sizes(source: str) -> ModelSizes:
    """Of a checkpoint as for --path, a folder in Hugging Face's layout, or the name of an architecture."""
    if source in ARCH_MODEL_REGISTRY:
        return ModelSizes.of_shapes(shapes_of_architecture(source))
    if Path(source).is_dir():
        folder = HfFolder(Path(source))
        config = NllbConfig.from_hf(folder.config, source)
        there = folder.shapes()
        found = {tensor: key for key, tensor in match_tensors(named_tensors(config), there, source).items()}
        stored = sum(math.prod(tensor.shape) * there[key][1].itemsize for tensor, key in found.items())
        return ModelSizes.of_shapes({tensor.fairseq[0]: tensor.shape for tensor in found}, stored)
    once: dict[Hashable, tuple[str, Tensor]] = {}
    state = read_checkpoint(source)
    for key, tensor in state["model"].items():
        # tied embeddings may also lie in a file twice: they are one where their values are
        tied = key.endswith(_VOCABULARY_KEYS) and getattr(tensor, "checksum", None)
        once.setdefault(tied or place_of(tensor), (key, tensor))
    shapes = {key: tuple(tensor.shape) for key, tensor in once.values()}
    stored = sum(tensor.nbytes for _, tensor in once.values())
    sizes = ModelSizes.of_shapes(shapes, stored, choices=1 if model_field(state, "moe_top1_expert") is True else 2)
    about = state["model"].about
    return sizes if about is None else replace(sizes, quantized=(about.experts, about.dense == DENSE))


class _Vocabulary:
    """What a model asks of its task; NLLB-200's size."""

    def __init__(self, size: int):
        self.source_dictionary = self.target_dictionary = _Dictionary(size)


class _Dictionary:
    def __init__(self, size: int):
        self._size = size

    def __len__(self) -> int:
        return self._size

    def pad(self) -> int:
        return 1


def state_of_architecture(name: str, vocabulary: int = 256206, **fields) -> dict[str, Tensor]:
    """The state of the registered architecture `name` on the meta device, no weight made; tied tensors are the same.

    fields: set above the architecture's own.
    """
    args = Namespace(allocate_experts=False, initialize_experts=False, **fields)
    ARCH_CONFIG_REGISTRY[name](args)
    with torch.device("meta"):
        return ARCH_MODEL_REGISTRY[name].build_model(args, _Vocabulary(vocabulary)).state_dict(keep_vars=True)


def shapes_of_architecture(name: str, vocabulary: int = 256206, **fields) -> dict[str, tuple[int, ...]]:
    """As `state_of_architecture`, tied tensors under their first name."""
    state = state_of_architecture(name, vocabulary, **fields)
    once = {id(tensor): (key, tensor) for key, tensor in reversed(state.items())}
    return {key: tuple(tensor.shape) for key, tensor in reversed(once.values())}


def plan(
    sizes: ModelSizes,
    device: int,
    host: int | None = None,
    work: Workload | None = None,
    weights: str = FLOAT,
    int8_dense: bool = False,
) -> list[Setting]:
    """The ways to serve on GPUs of `device` bytes each and `host` bytes of main memory (None: whatever it takes).

    weights: how the experts lie, one of FORMATS. int8_dense: whether the dense part lies in int8 beside them. A
    quantised checkpoint says both itself.
    """
    work = work or Workload()
    weights, int8_dense = sizes.quantized or (weights, int8_dense)
    element, batch = work.element, work.bytes(sizes) + PROCESS
    dense, a_place = sizes.dense_bytes(element, int8_dense), sizes.expert_bytes(weights, element) * sizes.moe_layers
    experts = sizes.expert_bytes(weights, element) * sizes.all_experts
    checkpoint = sizes.dense_bytes(element) + sizes.expert * sizes.all_experts * element
    disk = checkpoint if sizes.file_bytes is None else sizes.file_bytes
    room = int(USABLE * device) - dense - batch
    dtype, on_disk = "--moe-dtype float16" if element == 2 else "", "--expert-store disk"
    stored, of_cpu = 0, ""  # bytes of a store beside the checkpoint
    if weights != FLOAT and sizes.quantized is None:
        of_cpu, stored = f"--moe-weights {weights}" + " --moe-weights-scope all" * int8_dense, experts
        dtype, on_disk = f"{dtype} {of_cpu}".strip(), f"{on_disk} --expert-store-dir DIR"

    def setting(name: str, device_bytes: int, host_bytes: int, *flags: str, places: int | None = None) -> Setting:
        why = []
        if device_bytes > USABLE * device:
            why.append(f"more than {USABLE:.0%} of the GPU's {_gib(device)}")
        if host is not None and host_bytes > host:
            why.append(f"more than {_gib(host)} of RAM")
        needed = disk + stored * (on_disk in flags)
        joined = " ".join(filter(None, flags))
        return Setting(name, device_bytes, host_bytes, needed, not why, joined, ", ".join(why), places)

    settings = [setting("one GPU, all experts on it", dense + experts + batch, dense + experts + PROCESS, dtype)]
    if not sizes.experts:
        return settings
    host_bytes = dense + experts + PROCESS
    found = sizes.encoder_alone(room, a_place)
    if found is not None:  # a decoder's step waits for no expert
        places, taken = found
        flags = (dtype, f"--expert-buffer-scope encoder --expert-buffer-size {places}")
        name = "one GPU, buffer of the encoder, its experts in RAM"
        settings.append(setting(name, dense + batch + taken, host_bytes, *flags, places=places))
    staging = STAGING_SLOTS * sizes.expert_bytes(weights, element)
    places = max(1, min((room - staging) // a_place, sizes.experts))
    used = dense + batch + staging + places * a_place
    buffer = f"--expert-buffer-size {places}"
    settings.append(setting("one GPU, buffer, experts in RAM", used, host_bytes, dtype, buffer, places=places))
    free = experts if host is None else host - dense - PROCESS
    tier = max(0, min(free, experts) // 2)
    flags = (dtype, buffer, on_disk, f"--expert-host-memory {max(1, tier // (1 << 30))}G")
    settings.append(setting("one GPU, buffer, disk and some RAM", used, dense + tier + PROCESS, *flags, places=places))
    fitting = (ranks for ranks in range(2, sizes.experts + 1) if room >= a_place * -(-sizes.experts // ranks))
    ranks = next(fitting, sizes.experts)
    share = dense + a_place * -(-sizes.experts // ranks)
    settings.append(setting(f"{ranks} GPUs, torchrun", share + batch, (share + PROCESS) * ranks, dtype))
    cpu = Workload(work.batch, work.beam, work.length, element=4)
    wanted = sizes.dense_bytes(4, int8_dense) + cpu.bytes(sizes) + PROCESS
    an_expert = sizes.expert_bytes(weights, 4) * sizes.moe_layers
    whole = wanted + sizes.expert_bytes(weights, 4) * sizes.all_experts
    settings.append(setting("CPU, all experts in RAM", 0, whole, "--cpu", of_cpu))
    left = None if host is None else int(USABLE * host - wanted)
    found = None if left is None else sizes.encoder_alone(left, an_expert)
    if found is not None:
        places, taken = found
        flags = (of_cpu, f"--expert-buffer-scope encoder --expert-buffer-size {places}", on_disk)
        settings.append(setting("CPU, buffer of the encoder, disk", 0, wanted + taken, "--cpu", *flags, places=places))
    staging = STAGING_SLOTS * sizes.expert_bytes(weights, 4)
    places = CPU_PLACES if left is None else (left - staging) // an_expert
    places = max(1, min(places, sizes.experts))
    needed = wanted + staging + places * an_expert
    buffer = f"--expert-buffer-size {places}"
    settings.append(setting("CPU, buffer, disk", 0, needed, "--cpu", of_cpu, buffer, on_disk, places=places))
    return settings


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def table(settings: list[Setting]) -> str:
    """As Markdown, in GiB (2**30 bytes), the unit of the flags."""
    head, rows = ("setting", "fits", "GPU memory", "RAM", "disk", "flags"), []
    for item in settings:
        sizes = (_gib(value) if value else "" for value in (item.device, item.host, item.disk))
        fits = "yes" if item.fits else f"no: {item.why}"
        rows.append((item.name, fits, *sizes, f"`{item.flags}`" if item.flags else ""))
    return tabulate(rows, head, tablefmt="github", disable_numparse=True)
