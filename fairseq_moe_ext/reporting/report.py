"""The report of what was served (`--moe-report`), as JSON; docs/report.md lists its fields."""

from __future__ import annotations

import resource
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from weakref import WeakValueDictionary

import torch

from fairseq_moe_ext.checkpoints.kept_experts import KeptExperts
from fairseq_moe_ext.experts.buffer_call import BufferCall
from fairseq_moe_ext.gating import MOELayer
from fairseq_moe_ext.models.int8_dense import bytes_in_int8
from fairseq_moe_ext.ranks.exchange import Exchange
from fairseq_moe_ext.reporting.finite import NonFinite
from fairseq_moe_ext.reporting.totals import LayerTotals, PassTotals
from fairseq_moe_ext.reporting.weight_error import LayerSample, WeightError


class Report:
    """Collects what one process served, on rank 0 what all ranks served; `as_dict` is what `--moe-report` writes."""

    def __init__(self, gating: str):
        self.gating = gating
        self._exchange: Exchange | None = None
        self._ranks: list[dict] = []  # entries of `ranks`, once rank 0 has heard of all
        self.encoder = PassTotals()
        self.decoder = PassTotals()
        self.sentences = 0
        self.hypothesis_tokens = 0
        self.non_finite = NonFinite()
        self.layers: dict[str, LayerTotals] = {}
        self.samples: Mapping[str, LayerSample] = {}  # of the layers, where the weights' errors are asked for
        # of the layers; a report does not keep a model that was served
        self._experts: Mapping[str, torch.nn.Module] = WeakValueDictionary()
        self.device = "cpu"
        self.dtype = "float32"
        self.expert_format = ""
        self.expert_bytes_total = self.dense_bytes_int8 = 0
        self._expert_bytes = self._expert_bytes_resident = 0  # of this rank
        self.loading: dict[str, float] | None = None
        self.kept: KeptExperts | None = None  # of a pruned model, by their numbers in the whole one

    def describe(self, model: torch.nn.Module, layers: dict[str, MOELayer]) -> None:
        """Take down device, dtype and expert bytes of a model that is ready to serve, as often as they change."""
        parameter = next(model.parameters())
        self.device, self.dtype = str(parameter.device), str(parameter.dtype).removeprefix("torch.")
        experts = {name: layer.experts for name, layer in layers.items()}
        self._experts = WeakValueDictionary(experts)
        self.kept = getattr(model, "kept_experts", None)
        self.expert_format = next((each.format.name for each in experts.values()), "")
        self.expert_bytes_total = sum(each.num_experts * each.expert_bytes for each in experts.values())
        self.dense_bytes_int8 = bytes_in_int8(model)
        self._expert_bytes = sum(each.total_bytes for each in experts.values())
        self._expert_bytes_resident = sum(each.resident_bytes for each in experts.values())
        self.layers = {name: self.layers.get(name) or LayerTotals(name) for name in layers}
        loading = getattr(model, "loading", None)
        if loading is not None and self.loading is None:  # later it also counts what a buffer reads
            self.loading = loading.as_dict()

    def buffer_totals(self) -> dict[str, BufferCall]:
        """What every layer's experts have fetched so far."""
        return {name: experts.totals for name, experts in self._experts.items()}

    def set_buffer_totals(self, totals: Mapping[str, BufferCall]) -> None:
        """Take back what was fetched since `totals` were read."""
        for name, experts in self._experts.items():
            if experts.totals != totals[name]:
                experts.totals = totals[name]

    def take_in_buffers(self) -> None:
        """The experts' figures, while they are there."""
        for name, totals in self.buffer_totals().items():
            self.layers[name].buffer = totals

    def count_hypotheses(self, hypotheses: list[list[dict]]) -> None:
        """Add one batch of a generator's results: per sentence its hypotheses, best first."""
        self.sentences += len(hypotheses)
        self.hypothesis_tokens += sum(len(sentence[0]["tokens"]) for sentence in hypotheses if sentence)

    def close(self, exchange: Exchange | None = None) -> None:
        """All that this process served is done: take in what its experts ran and fetched, for whichever rank."""
        self.take_in_buffers()
        for name, sample in self.samples.items():
            self.layers[name].weight_error = sample.compare()
        for number, layer in enumerate(self.layers.values()):
            if layer.buffer.hits + layer.buffer.misses:
                layer.seconds["copy"] = layer.buffer.seconds
            if exchange is not None:
                rows = exchange.rows_computed[number]
                layer.load_per_rank = [rows * (rank == exchange.rank) for rank in range(exchange.world_size)]
        self._ranks = [self._rank(exchange)]

    def figures(self) -> dict:
        """What rank 0 needs to know of this rank, as JSON."""
        return {
            "encoder": asdict(self.encoder),
            "decoder": asdict(self.decoder),
            "sentences": self.sentences,
            "hypothesis_tokens": self.hypothesis_tokens,
            "non_finite": asdict(self.non_finite),
            "layers": [asdict(layer) for layer in self.layers.values()],
            "rank": self._ranks[0],
        }

    def add_rank(self, figures: dict) -> None:
        """Add another rank's figures; passes of different ranks run at the same time, so the longest counts."""
        for totals, other in ((self.encoder, figures["encoder"]), (self.decoder, figures["decoder"])):
            totals.tokens += other["tokens"]
            totals.steps += other["steps"]
            totals.seconds = max(totals.seconds, other["seconds"])
        self.sentences += figures["sentences"]
        self.hypothesis_tokens += figures["hypothesis_tokens"]
        self.non_finite.add(NonFinite(**figures["non_finite"]))
        for layer in figures["layers"]:
            own = {"buffer": BufferCall(**layer["buffer"]), "weight_error": WeightError(**layer["weight_error"])}
            self.layers[layer["name"]].add_totals(LayerTotals(**{**layer, **own}))
        self._ranks.append(figures["rank"])

    def _rank(self, exchange: Exchange | None) -> dict:
        """This rank's entry in `ranks`."""
        rounds = {} if exchange is None else {"rounds": exchange.rounds, "idle_rounds": exchange.idle_rounds}
        buffer = self.buffer()
        return {
            "rank": 0 if exchange is None else exchange.rank,
            "tokens": self.encoder.tokens + self.decoder.tokens,
            "bytes_exchanged": sum(layer.bytes_exchanged for layer in self.layers.values()),
            **rounds,
            "hits": buffer.hits,
            "misses": buffer.misses,
            "expert_bytes": self._expert_bytes,
            "expert_bytes_resident": self._expert_bytes_resident,
            "peak_device_bytes": torch.cuda.max_memory_allocated() if self.device.startswith("cuda") else 0,
            "peak_rss_bytes": peak_resident_bytes(),
        }

    def _load_shares(self) -> list[float]:
        """Per rank its share of all rows that experts ran."""
        rows = [layer.load_per_rank for layer in self.layers.values() if layer.load_per_rank]
        if not rows:
            return [1.0 / len(self._ranks)] * len(self._ranks)
        shares = [sum(each) / max(sum(map(sum, rows)), 1) for each in zip(*rows, strict=True)]
        return [shares[rank["rank"]] for rank in self._ranks]  # of an interrupted run some may be missing

    def as_dict(self) -> dict:
        """The whole report, after `close` and every other rank's `add_rank`."""
        ranks = self._ranks
        report = {
            "gating": self.gating,
            "world_size": len(ranks),
            "device": self.device,
            "dtype": self.dtype,
            "expert_format": self.expert_format,
            "threads": torch.get_num_threads(),
        }
        if self.loading is not None:
            report["loading"] = self.loading
        if self.encoder.steps:
            report["encoder"] = {
                "tokens": self.encoder.tokens,
                "seconds": self.encoder.seconds,
                "tokens_per_second": self.encoder.tokens_per_second,
            }
        report["decoder"] = {
            "tokens": self.decoder.tokens,
            "steps": self.decoder.steps,
            "seconds": self.decoder.seconds,
            "tokens_per_second": self.decoder.tokens_per_second,
        }
        if self.sentences:
            report["generation"] = {"sentences": self.sentences, "hypothesis_tokens": self.hypothesis_tokens}
        report["non_finite"] = asdict(self.non_finite)
        report["memory"] = {
            "peak_device_bytes": max(rank["peak_device_bytes"] for rank in ranks),
            "peak_rss_bytes": max(rank["peak_rss_bytes"] for rank in ranks),
            "dense_bytes_int8": self.dense_bytes_int8,
            "expert_bytes_total": self.expert_bytes_total,
            "expert_bytes_resident": sum(rank["expert_bytes_resident"] for rank in ranks),
        }
        report["layers"] = [
            {
                "name": layer.name,
                "assignments": layer.assignments,
                "dropped": layer.dropped,
                "rerouted": layer.rerouted,
                "active_experts_mean": layer.active_experts_mean,
                "load": layer.load,
                **({} if self.kept is None else {"kept_experts": list(self.kept.layers[layer.name])}),
                **_before_the_capacity(layer),
                **({"first_choice_shares": layer.first_shares} if layer.first_shares else {}),
                **_error_of_weights(layer.weight_error),
                **({"load_per_rank": layer.load_per_rank} if layer.load_per_rank else {}),
                "bytes_exchanged": layer.bytes_exchanged,
                **{name: value for name, value in asdict(layer.buffer).items() if name != "seconds"},
                "seconds": layer.seconds,
            }
            for layer in self.layers.values()
        ]
        report["ranks"] = [
            {**rank, "load_share": share} for rank, share in zip(ranks, self._load_shares(), strict=True)
        ]
        return report

    def buffer(self) -> BufferCall:
        """Of all layers together."""
        return sum((layer.buffer for layer in self.layers.values()), BufferCall())

    def summary(self) -> str:
        """One line for the log."""
        parts = [f"{self.gating} gating"]
        if len(self._ranks) > 1:
            parts.append(f"{len(self._ranks)} ranks")
        for name, totals in (("encoder", self.encoder), ("decoder", self.decoder)):
            if totals.steps:
                parts.append(f"{name} {totals.tokens:,} tokens at {totals.tokens_per_second:,.0f}/s")
        layers = [layer for layer in self.layers.values() if layer.calls]
        if layers:
            active = sum(layer.active_experts_mean for layer in layers) / len(layers)
            parts.append(f"{active:.1f} of {len(layers[0].load)} experts active in a pass")
        dropped, rerouted, assignments = (
            sum(getattr(layer, name) for layer in layers) for name in ("dropped", "rerouted", "assignments")
        )
        parts.append(f"{dropped:,} of {assignments:,} assignments dropped")
        if rerouted:
            parts.append(f"{rerouted:,} rerouted")
        buffer = self.buffer()
        if buffer.hits + buffer.misses:
            share = buffer.misses / (buffer.hits + buffer.misses)
            parts.append(f"{share:.1%} of experts missed in the buffer, {buffer.bytes_copied / 1e9:,.2f} GB copied")
        return "served: " + "; ".join(parts)


def _before_the_capacity(layer: LayerTotals) -> dict:
    """Capacity-aware inference's figures; nothing where there was no capacity."""
    if not layer.load_before:
        return {}
    return {
        "load_before": layer.load_before,
        "dropped_fraction": layer.overflowing / layer.assignments if layer.assignments else 0.0,
    }


def _error_of_weights(found: WeightError) -> dict:
    return {"weight_error": {"rows": found.rows, "relative": found.relative}} if found.rows else {}


def peak_resident_bytes() -> int:
    """The most memory that this process ever had resident."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    except (OSError, StopIteration):  # not Linux; this figure may be the parent process's
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
