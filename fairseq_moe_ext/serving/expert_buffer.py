"""Expert buffering of a served model: which layers, how many experts, from which store.

Legend: E = experts of a layer, H = local experts of this process, N = places in a layer's buffer.
"""

from __future__ import annotations

import hashlib
import logging
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from fairseq_moe_ext.buffering.cache import BufferedExperts
from fairseq_moe_ext.buffering.expert_file import open_or_build, other_files, store_file
from fairseq_moe_ext.buffering.expert_profile import Languages, LayerImportance, importance_of_layers
from fairseq_moe_ext.buffering.habits import in_order
from fairseq_moe_ext.buffering.slot_pool import SlotPool, ahead_slots, staging_slots
from fairseq_moe_ext.buffering.store import ExpertStore, FileStore, HostStore, LazyTensors
from fairseq_moe_ext.checkpoints.kept_experts import KeptExperts
from fairseq_moe_ext.checkpoints.stored_tensor import StoredTensor
from fairseq_moe_ext.experts.called_by_counts import CalledByCounts
from fairseq_moe_ext.experts.formats import FLOAT, Format
from fairseq_moe_ext.gating import MOELayer
from fairseq_moe_ext.serving.buffer_bytes import shared_out
from fairseq_moe_ext.serving.free_memory import free_bytes, free_host_bytes

logger = logging.getLogger("fairseq_moe_ext")

AUTO = "auto"
SCOPES = ("all", "encoder", "decoder")
STORES = ("host", "disk")
OFF, LAYERS = PREFETCH = ("off", "layers")
# Of the free memory what `auto` takes: the rest is for a batch's activations and a decoder's growing caches.
AUTO_SHARE = 0.7


@dataclass(frozen=True)
class InBytes:
    """A buffer's size: of all slots of all layers of this process, those on their way included."""

    count: int


@dataclass(frozen=True)
class BufferSettings:
    """size: N, bytes or `auto`. policy, order: buffering/eviction.py.

    store_dir: None: the checkpoint itself, or beside it.
    host_memory: bytes between a disk store and a GPU, None: by what is free. profile: one of KINDS
    (buffering/expert_profile.py), for the run's languages. prefetch: one of PREFETCH.
    """

    size: int | InBytes | str
    scope: str
    policy: str
    order: str
    store: str
    store_dir: Path | None = None
    host_memory: int | None = None
    profile: Path | None = None
    prefetch: str = OFF
    languages: Languages = Languages()


class ExpertBuffer:
    """Gives one model's layers their buffered experts, and starts them.

    local_ranks: so many share this machine's memory. kept: of a pruned model, whose profile is of the whole one.
    checkpoint: set before the weights come; names the disk store's files, together with the values' fingerprint.
    """

    def __init__(self, settings: BufferSettings, local_ranks: int = 1, kept: KeptExperts | None = None):
        self._settings = settings
        self._local_ranks, self._kept = local_ranks, kept
        self._layers: dict[str, BufferedExperts] = {}
        self._importance: dict[str, LayerImportance] = {}
        self._started: tuple[torch.device, torch.dtype] | None = None  # where the model was at the start
        self._superseded: list[Path] = []  # what lay beside the files that were built
        self.checkpoint = Path("checkpoint.pt")

    def install(self, layers: dict[str, MOELayer]) -> None:
        """Replace experts that have no memory yet: by buffered ones, or where all of them fit by resident ones.

        A rank may hold no expert of a layer, which has no buffer then.
        """
        settings = self._settings
        for name, layer in layers.items():
            experts = layer.experts
            in_scope = settings.scope == "all" or name.startswith(f"{settings.scope}.")
            fits = not experts.local or isinstance(settings.size, int) and settings.size > len(experts.local)
            if not in_scope or fits:
                experts.to_empty(device="cpu")
                if in_scope and experts.local:
                    logger.info(
                        "%s: --expert-buffer-size %d is more than its %d experts: all of them are resident",
                        name, settings.size, len(experts.local),
                    )
            else:
                self._layers[name] = self._buffered(name, experts)
                layer.use(experts=self._layers[name])
        if not layers or not any(settings.scope in ("all", name.split(".")[0]) for name in layers):
            logger.warning("--expert-buffer-scope %s: the model has no MoE layer there", settings.scope)
        if settings.profile is not None:
            self._importance = self._read_profile(settings.profile, layers)

    def _read_profile(self, path: Path, layers: dict[str, MOELayer]) -> dict[str, LayerImportance]:
        kept = self._kept
        num_experts = {
            name: layer.experts.num_experts if kept is None else kept.num_experts for name, layer in layers.items()
        }
        try:
            found = importance_of_layers(path, num_experts, list(self._layers), self._settings.languages)
        except ValueError as error:
            raise ValueError(f"--expert-profile {error}") from error
        return found if kept is None else {name: each.of_experts(kept.layers[name]) for name, each in found.items()}

    def _buffered(self, name: str, experts: CalledByCounts) -> BufferedExperts:
        return BufferedExperts(
            experts.num_experts,
            experts.model_dim,
            experts.hidden_dim,
            experts.activation,
            make_store=partial(self._make_store, name, experts),
            policy=self._settings.policy,
            order=self._settings.order,
            local=experts.local,
            kernel=experts.kernel,
            form=experts.format,
        )

    def _make_store(
        self, name: str, experts: CalledByCounts, weights: list[list[Tensor]], dtype: torch.dtype
    ) -> ExpertStore:
        if self._settings.store == "host":
            return HostStore(weights, dtype)
        in_records = all(isinstance(part, StoredTensor) and part.is_contiguous() for parts in weights for part in parts)
        if in_records and self._settings.store_dir is None:
            return FileStore(LazyTensors(weights), dtype)
        folder = self._settings.store_dir or self.checkpoint.parent
        # ranks that hold other experts have files of their own
        share = "" if len(experts.local) == experts.num_experts else f".{zlib.crc32(repr(experts.local).encode()):08x}"
        form = experts.format
        kind = "" if form.name == FLOAT else f".{form.name}"
        values = fingerprint([form.originals(parts) for parts in weights])
        named = f"{self.checkpoint.stem}.{name}{share}{kind}"
        file = store_file(folder, named, values)
        is_new = not file.exists()
        source = open_or_build(file, experts.local, weights, values, form.keys, form.version)
        if is_new:
            self._superseded += other_files(folder, named, file)
        return FileStore(source, dtype)

    def start(self, model: nn.Module) -> None:
        """Make and fill the slots: `model` has its weights, dtype and device. Once more changes nothing."""
        if not self._layers:
            return
        parameter = next(model.parameters())
        device, settings = parameter.device, self._settings
        if self._started == (device, parameter.dtype) and all(layer.is_started for layer in self._layers.values()):
            return
        if settings.store == "host" and device.type == "cpu":
            logger.warning(
                "--expert-store host saves nothing on a CPU: all experts lie in main memory beside the buffer; "
                "--expert-store disk leaves them on disk"
            )
        for layer in self._layers.values():
            layer.stop()  # what it holds is free for `auto`
        sizes = self._sizes(device)
        capacities = self._host_capacities()
        pools = self._pools(sizes)
        for name, layer in self._layers.items():
            ranking = self._importance[name].ranking() if name in self._importance else None
            layer.start(sizes[name], ranking, capacities[name], pools[layer.format], name)
        if settings.prefetch == LAYERS:
            self._let_layers_look_ahead()
        kept, total = (
            sum(getattr(layer, count) for layer in self._layers.values()) for count in ("resident_bytes", "total_bytes")
        )
        logger.info(
            "%d MoE layers have %d of %d experts in a buffer on %s (%s, %s): %.2f of %.2f GB, the rest in the %s store",
            len(self._layers), sum(sizes.values()), sum(len(layer.local) for layer in self._layers.values()), device,
            settings.policy, settings.order, kept / 1e9, total / 1e9, settings.store,
        )
        self._started = device, parameter.dtype
        self._tell_of_superseded()

    def _by_format(self) -> dict[Format, dict[str, BufferedExperts]]:
        """The layers of each format, which share a pool."""
        found: dict[Format, dict[str, BufferedExperts]] = {}
        for name, layer in self._layers.items():
            found.setdefault(layer.format, {})[name] = layer
        return found

    def _pools(self, sizes: dict[str, int]) -> dict[Format, SlotPool]:
        """sizes: N of every layer."""
        pools = {}
        for form, layers in self._by_format().items():
            kept = {name: (sizes[name], len(layer.local)) for name, layer in layers.items()}
            first = next(iter(layers.values()))
            ahead = 0 if self._settings.prefetch == OFF else ahead_slots(kept.values())
            pools[form] = SlotPool(form, kept, first.like, first.readers, ahead)
        return pools

    def _let_layers_look_ahead(self) -> None:
        for name, following in in_order(list(self._layers)).items():
            layer = self._layers[name]
            same_pool = [self._layers[each] for each in following if self._layers[each].pool is layer.pool]
            layer.precede(*same_pool)

    def _tell_of_superseded(self) -> None:
        sizes, self._superseded = {file: _size_of(file) for file in self._superseded}, []
        if any(sizes.values()):
            logger.warning(
                "%d files of %.2f GB beside the ones that were built are of another checkpoint of this name, or of "
                "this one before it was replaced; they may be deleted unless they are still served: %s",
                len(sizes), sum(sizes.values()) / 1e9, ", ".join(map(str, sizes)),
            )

    def _sizes(self, device: torch.device) -> dict[str, int]:
        """N of every layer."""
        size = self._settings.size
        if isinstance(size, InBytes):
            settings = self._settings
            return shared_out(
                self._layers, size.count, self._bytes_of_slots, self._importance, settings.order, settings.policy
            )
        if size != AUTO:
            return dict.fromkeys(self._layers, size)
        free = free_bytes(device) // (1 if device.type == "cuda" else self._local_ranks)
        most = max(len(layer.local) for layer in self._layers.values())
        fitting = next((n for n in range(most, 0, -1) if self._bytes_of_slots(self._each(n)) <= AUTO_SHARE * free), 0)
        sizes = self._each(max(1, fitting))
        logger.info(
            "--expert-buffer-size auto: %d experts per layer, of %.2f GB that are free on %s",
            max(sizes.values()), free / 1e9, device,
        )
        if fitting < 1:
            logger.warning("%.2f GB of free memory are tight for a buffer of one expert per layer", free / 1e9)
        return sizes

    def _each(self, count: int) -> dict[str, int]:
        """Of every layer, as many as it has."""
        return {name: min(count, len(layer.local)) for name, layer in self._layers.items()}

    def _bytes_of_slots(self, sizes: Mapping[str, int]) -> int:
        """In all, as `_pools` makes them; sizes: N of every layer."""
        taken = 0
        for layers in self._by_format().values():
            kept = [(sizes[name], len(layer.local)) for name, layer in layers.items()]
            ahead = 0 if self._settings.prefetch == OFF else ahead_slots(kept)
            slots = sum(size for size, _ in kept) + staging_slots(kept) + ahead
            taken += slots * next(iter(layers.values())).expert_bytes
        return taken

    def _host_capacities(self) -> dict[str, int | None]:
        """How many of every layer's experts main memory holds between the disk store and a GPU, wherever slots are."""
        if self._settings.store == "host":
            return dict.fromkeys(self._layers)
        room = self._settings.host_memory
        if room is None:
            room = int(AUTO_SHARE * free_host_bytes()) // self._local_ranks
        total = sum(layer.total_bytes for layer in self._layers.values())
        return {
            name: max(1, min(room * len(layer.local) // total, len(layer.local)))
            for name, layer in self._layers.items()
        }


def _size_of(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:  # it was another process's, and has its name by now
        return 0


def fingerprint(weights: Sequence[Sequence[Tensor]]) -> str:
    """Equal for equal values, by the checksums that a file has or else by the values themselves."""
    digest = hashlib.sha256()
    for parts in weights:
        for part in parts:
            digest.update(repr(_checksum(part)).encode())
    return digest.hexdigest()


def _checksum(part: Tensor) -> tuple:
    checksum = part.checksum if isinstance(part, StoredTensor) else None
    if checksum is not None:
        return checksum
    values = part.read() if isinstance(part, StoredTensor) else part
    data = values.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return zlib.crc32(data), part.dtype, tuple(part.shape)
