"""What serving a model takes in device memory, main memory and disk, from its tensors' shapes, and the flags to use.

Legend: E = experts of a layer, N = experts of a layer in a buffer, R = ranks. Bytes throughout. An estimate: weights
are exact, what a batch needs is the decoder's caches, the scores over the vocabulary and a lump sum.
"""

from __future__ import annotations

import math
import re
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY

from fairseq_moe_ext.buffering.cache import STAGING_SLOTS
from fairseq_moe_ext.serving.checkpoint import read_checkpoint
from fairseq_moe_ext.serving.convert_nllb import match_tensors
from fairseq_moe_ext.serving.errors import CheckpointError
from fairseq_moe_ext.serving.hf_folder import HfFolder
from fairseq_moe_ext.serving.nllb_config import NllbConfig
from fairseq_moe_ext.serving.nllb_names import named_tensors
from fairseq_moe_ext.serving.state_keys import EXPERT_KEY

USABLE = 0.95  # of a device's memory: the rest is fragments
PROCESS = 2_000_000_000  # Python, PyTorch and, on a GPU, its context
CPU_PLACES = 8  # N on a CPU where nothing else is asked for


@dataclass(frozen=True)
class ModelSizes:
    """In elements. dense: all but experts; expert: one of a layer; moe_layers and experts: how many."""

    dense: int
    expert: int
    moe_layers: int
    experts: int
    decoder_layers: int
    model_dim: int
    vocabulary: int

    @classmethod
    def of_shapes(cls, shapes: Mapping[str, tuple[int, ...]]) -> ModelSizes:
        """shapes: of a state in fairseq's names; embeddings of one shape count once, as they are tied."""
        embeddings = next((shape for key, shape in shapes.items() if key.endswith("embed_tokens.weight")), None)
        if embeddings is None:
            raise CheckpointError("a model must have embed_tokens.weight")
        vocabulary, model_dim = embeddings
        sizes: dict[tuple[str, int], int] = {}
        dense = vocabulary * model_dim
        for name, shape in shapes.items():
            match = EXPERT_KEY.match(name)
            if match:
                place = match.group(1), int(match.group(2))
                sizes[place] = sizes.get(place, 0) + math.prod(shape)
            elif shape != embeddings:
                dense += math.prod(shape)
        layers = {layer for layer, _ in sizes}
        numbers = re.compile(r"decoder\.layers\.(\d+)\.")
        return cls(
            dense=dense,
            expert=max(sizes.values(), default=0),
            moe_layers=len(layers),
            experts=len(sizes) // len(layers) if layers else 0,
            decoder_layers=len({match.group(1) for match in map(numbers.match, shapes) if match}),
            model_dim=model_dim,
            vocabulary=vocabulary,
        )

    @property
    def parameters(self) -> int:
        return self.dense + self.expert * self.experts * self.moe_layers


@dataclass(frozen=True)
class Workload:
    """What is served at a time: sentences, hypotheses of each, tokens of source and target; bytes of an element."""

    batch: int = 16
    beam: int = 4
    length: int = 128
    element: int = 2

    def bytes(self, sizes: ModelSizes) -> int:
        rows = self.batch * self.beam
        tokens = rows * self.length
        caches = 4 * sizes.decoder_layers * tokens * sizes.model_dim * self.element  # own and encoder's k, v
        return caches + 2 * 4 * rows * sizes.vocabulary  # scores and their log-softmax, float32


@dataclass(frozen=True)
class Setting:
    """device: per GPU. fits: whether `device` is within what there is; flags: of fairseq-generate."""

    name: str
    device: int
    host: int
    disk: int
    fits: bool
    flags: str


def read_sizes(source: str) -> ModelSizes:
    """Of a checkpoint as for --path, a folder in Hugging Face's layout, or the name of an architecture."""
    if source in ARCH_MODEL_REGISTRY:
        return ModelSizes.of_shapes(shapes_of_architecture(source))
    if Path(source).is_dir():
        folder = HfFolder(Path(source))
        config = NllbConfig.from_hf(folder.config, source)
        found = match_tensors(named_tensors(config), folder.shapes(), source)
        return ModelSizes.of_shapes({tensor.fairseq[0]: tensor.shape for tensor in found.values()})
    return ModelSizes.of_shapes({key: tuple(tensor.shape) for key, tensor in read_checkpoint(source)["model"].items()})


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


def shapes_of_architecture(name: str, vocabulary: int = 256206, **fields) -> dict[str, tuple[int, ...]]:
    """Of a state of the registered architecture `name`, no weight made; fields: set above the architecture's own."""
    args = Namespace(allocate_experts=False, initialize_experts=False, **fields)
    ARCH_CONFIG_REGISTRY[name](args)
    with torch.device("meta"):
        model = ARCH_MODEL_REGISTRY[name].build_model(args, _Vocabulary(vocabulary))
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


def plan(sizes: ModelSizes, device: int, host: int | None = None, work: Workload | None = None) -> list[Setting]:
    """The ways to serve on GPUs of `device` bytes each and `host` bytes of main memory (None: whatever it takes)."""
    work = work or Workload()
    element, batch = work.element, work.bytes(sizes) + PROCESS
    dense, a_place = sizes.dense * element, sizes.expert * sizes.moe_layers * element
    experts = a_place * sizes.experts
    disk = dense + experts
    room = int(USABLE * device) - dense - batch
    dtype = "--moe-dtype float16" if element == 2 else ""
    enough = host if host is not None else dense + experts + PROCESS

    def setting(name: str, device_bytes: int, host_bytes: int, fits: bool, *flags: str) -> Setting:
        within = host is None or host_bytes <= host
        return Setting(name, device_bytes, host_bytes, disk, fits and within, " ".join(filter(None, (dtype, *flags))))

    settings = [setting("one GPU, all experts on it", dense + experts + batch, dense + PROCESS, room >= experts)]
    if not sizes.experts:
        return settings
    places = min(room // a_place - STAGING_SLOTS, sizes.experts)
    used = dense + batch + (max(places, 1) + STAGING_SLOTS) * a_place
    buffer = f"--expert-buffer-size {max(places, 1)}"
    settings.append(setting("one GPU, buffer, experts in RAM", used, experts + PROCESS, places >= 1, buffer))
    tier = max(0, min(enough - PROCESS, experts) // 2)
    flags = (buffer, "--expert-store disk", f"--expert-host-memory {max(1, tier // (1 << 30))}G")
    settings.append(setting("one GPU, buffer, disk and some RAM", used, tier + PROCESS, places >= 1, *flags))
    ranks = next((ranks for ranks in range(2, sizes.experts + 1) if room >= a_place * -(-sizes.experts // ranks)), 0)
    share = a_place * -(-sizes.experts // max(ranks, 1))
    name, host_bytes = f"{ranks or 'several'} GPUs, torchrun", (dense + PROCESS) * max(ranks, 1)
    settings.append(setting(name, dense + share + batch, host_bytes, ranks > 0))
    cpu = Workload(work.batch, work.beam, work.length, element=4)
    wanted = sizes.dense * 4 + cpu.bytes(sizes) + PROCESS
    an_expert = sizes.expert * sizes.moe_layers * 4
    places = CPU_PLACES if host is None else int(USABLE * host - wanted) // an_expert - STAGING_SLOTS
    places = max(1, min(places, sizes.experts))
    needed = wanted + (places + STAGING_SLOTS) * an_expert
    fits = host is None or needed <= host
    flags = f"--cpu --expert-buffer-size {places} --expert-store disk"
    settings.append(Setting("CPU, buffer, disk", 0, needed, disk, fits, flags))
    return settings


def table(settings: list[Setting]) -> str:
    """As Markdown, in GiB (2**30 bytes), the unit of the flags."""
    rows = [("setting", "fits", "GPU memory", "RAM", "disk", "flags")]
    for item in settings:
        sizes = (f"{value / 2**30:.1f} GiB" if value else "" for value in (item.device, item.host, item.disk))
        rows.append((item.name, "yes" if item.fits else "no", *sizes, f"`{item.flags}`" if item.flags else ""))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    padded = ([cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows)
    lines = [f"| {' | '.join(row)} |" for row in padded]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)
