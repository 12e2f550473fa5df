"""The report of what was served (`--moe-report`), as JSON; its fields are listed in the README."""

from __future__ import annotations

import json
import os
import resource
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from fairseq_moe_ext.gating import MOELayer
from fairseq_moe_ext.gating.exchange import Exchange
from fairseq_moe_ext.gating.layer import LayerCall


@dataclass
class PassTotals:
    """Passes of one stack: tokens that entered (padding not counted), passes, host seconds."""

    tokens: int = 0
    steps: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


@dataclass
class LayerTotals:
    """Sums over the calls of one MoE layer."""

    name: str
    calls: int = 0
    assignments: int = 0
    dropped: int = 0
    active_experts: int = 0
    load: list[int] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    bytes_exchanged: int = 0
    load_per_rank: list[int] = field(default_factory=list)

    def add(self, call: LayerCall) -> None:
        self.add_totals(
            LayerTotals(
                self.name,
                calls=1,
                assignments=call.assignments,
                dropped=call.dropped,
                active_experts=sum(count > 0 for count in call.load),
                load=call.load,
                seconds=call.seconds,
                bytes_exchanged=call.bytes_exchanged,
            )
        )

    def add_totals(self, other: LayerTotals) -> None:
        """Add what the same layer did in other calls, or on another rank."""
        for name in ("calls", "assignments", "dropped", "active_experts", "bytes_exchanged"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.load = _sums(self.load, other.load)
        self.load_per_rank = _sums(self.load_per_rank, other.load_per_rank)
        for part, seconds in other.seconds.items():
            self.seconds[part] = self.seconds.get(part, 0.0) + seconds

    @property
    def active_experts_mean(self) -> float:
        return self.active_experts / self.calls if self.calls else 0.0


def _sums(a: list[int], b: list[int]) -> list[int]:
    """Elementwise; an empty list stands for zeros."""
    return [x + y for x, y in zip(a, b, strict=True)] if a and b else list(a or b)


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
        self.layers: dict[str, LayerTotals] = {}
        self.device = "cpu"
        self.dtype = "float32"
        self.expert_bytes = self.expert_bytes_total = 0
        self.loading: dict[str, float] | None = None

    def describe(self, model: torch.nn.Module, layers: dict[str, MOELayer]) -> None:
        """Take down device, dtype and expert bytes of a model that is ready to serve."""
        parameter = next(model.parameters())
        self.device, self.dtype = str(parameter.device), str(parameter.dtype).removeprefix("torch.")
        experts = [layer.experts for layer in layers.values()]
        self.expert_bytes = sum(weight.nbytes for each in experts for weight in each.parameters())
        self.expert_bytes_total = sum(each.num_experts * each.bytes_per_expert for each in experts)
        self.layers = {name: LayerTotals(name) for name in layers}
        loading = getattr(model, "loading", None)
        self.loading = None if loading is None else loading.as_dict()

    def count_hypotheses(self, hypotheses: list[list[dict]]) -> None:
        """Add one batch of a generator's results: per sentence its hypotheses, best first."""
        self.sentences += len(hypotheses)
        self.hypothesis_tokens += sum(len(sentence[0]["tokens"]) for sentence in hypotheses if sentence)

    def take_from(self, exchange: Exchange) -> None:
        """This rank's end of the exchange knows which rank it is, and what it computed for all of them."""
        self._exchange = exchange
        for layer, rows in zip(self.layers.values(), exchange.rows_computed, strict=False):
            layer.load_per_rank = [rows * (rank == exchange.rank) for rank in range(exchange.world_size)]
        self._ranks = [self._rank()]

    def figures(self) -> dict:
        """What rank 0 needs to know of this rank, as JSON."""
        return {
            "encoder": asdict(self.encoder),
            "decoder": asdict(self.decoder),
            "sentences": self.sentences,
            "hypothesis_tokens": self.hypothesis_tokens,
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
        for layer in figures["layers"]:
            self.layers[layer["name"]].add_totals(LayerTotals(**layer))
        self._ranks.append(figures["rank"])

    def _rank(self) -> dict:
        """This rank's entry in `ranks`."""
        exchange = self._exchange
        rounds = {} if exchange is None else {"rounds": exchange.rounds, "idle_rounds": exchange.idle_rounds}
        return {
            "rank": 0 if exchange is None else exchange.rank,
            "tokens": self.encoder.tokens + self.decoder.tokens,
            "bytes_exchanged": sum(layer.bytes_exchanged for layer in self.layers.values()),
            **rounds,
            "expert_bytes": self.expert_bytes,
            "peak_device_bytes": torch.cuda.max_memory_allocated() if self.device.startswith("cuda") else 0,
            "peak_rss_bytes": peak_resident_bytes(),
        }

    def _load_shares(self) -> list[float]:
        """Per rank its share of all rows that experts ran."""
        rows = [layer.load_per_rank for layer in self.layers.values() if layer.load_per_rank]
        if self._exchange is None or not rows:
            return [1.0 / max(len(self._ranks), 1)] * max(len(self._ranks), 1)
        return [sum(each) / max(sum(map(sum, rows)), 1) for each in zip(*rows, strict=True)]

    def as_dict(self) -> dict:
        ranks = self._ranks or [self._rank()]
        report = {
            "gating": self.gating,
            "world_size": len(ranks),
            "device": self.device,
            "dtype": self.dtype,
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
        report["memory"] = {
            "peak_device_bytes": max(rank["peak_device_bytes"] for rank in ranks),
            "peak_rss_bytes": max(rank["peak_rss_bytes"] for rank in ranks),
            "expert_bytes_total": self.expert_bytes_total,
            "expert_bytes_resident": sum(rank["expert_bytes"] for rank in ranks),
        }
        report["layers"] = [
            {
                "name": layer.name,
                "assignments": layer.assignments,
                "dropped": layer.dropped,
                "active_experts_mean": layer.active_experts_mean,
                "load": layer.load,
                **({"load_per_rank": layer.load_per_rank} if layer.load_per_rank else {}),
                "bytes_exchanged": layer.bytes_exchanged,
                "seconds": layer.seconds,
            }
            for layer in self.layers.values()
        ]
        report["ranks"] = [
            {**rank, "load_share": share} for rank, share in zip(ranks, self._load_shares(), strict=True)
        ]
        return report

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
        dropped, assignments = (sum(getattr(layer, name) for layer in layers) for name in ("dropped", "assignments"))
        parts.append(f"{dropped:,} of {assignments:,} assignments dropped")
        return "served: " + "; ".join(parts)


def peak_resident_bytes() -> int:
    """The most memory that this process ever had resident."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    except (OSError, StopIteration):  # not Linux; this figure may be the parent process's
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def write_json(path: str | os.PathLike, content: dict) -> None:
    """Write `content` to `path`, under a temporary name first."""
    temporary = Path(f"{path}.tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)
