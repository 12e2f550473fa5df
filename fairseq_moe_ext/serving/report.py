"""The report of what was served (`--moe-report`), as JSON; its fields are listed in the README."""

from __future__ import annotations

import json
import os
import resource
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch

from fairseq_moe_ext.gating import MOELayer
from fairseq_moe_ext.gating.experts import BufferCall
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
class BufferTotals:
    """Sums over the calls of one layer, or of several; all 0 where all experts are resident (see BufferCall)."""

    hits: int = 0
    misses: int = 0
    bytes_copied: int = 0
    host_reads: int = 0
    disk_reads: int = 0
    bytes_read: int = 0

    def add(self, other: BufferCall | BufferTotals) -> None:
        for item in fields(self):
            setattr(self, item.name, getattr(self, item.name) + getattr(other, item.name))


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
    buffer: BufferTotals = field(default_factory=BufferTotals)

    def add(self, call: LayerCall) -> None:
        self.calls += 1
        self.assignments += call.assignments
        self.dropped += call.dropped
        self.active_experts += sum(count > 0 for count in call.load)
        self.load = [a + b for a, b in zip(self.load, call.load, strict=True)] if self.load else list(call.load)
        for part, seconds in call.seconds.items():
            self.seconds[part] = self.seconds.get(part, 0.0) + seconds
        if call.buffer is not None:
            self.buffer.add(call.buffer)
            self.seconds["copy"] = self.seconds.get("copy", 0.0) + call.buffer.seconds

    @property
    def active_experts_mean(self) -> float:
        return self.active_experts / self.calls if self.calls else 0.0


class Report:
    """Collects what one process served; `as_dict` is what `--moe-report` writes."""

    def __init__(self, gating: str):
        self.gating = gating
        self.encoder = PassTotals()
        self.decoder = PassTotals()
        self.sentences = 0
        self.hypothesis_tokens = 0
        self.layers: dict[str, LayerTotals] = {}
        self.device = "cpu"
        self.dtype = "float32"
        self.expert_bytes = self.resident_bytes = 0
        self.loading: dict[str, float] | None = None

    def describe(self, model: torch.nn.Module, layers: dict[str, MOELayer]) -> None:
        """Take down device, dtype and expert bytes of a model that is ready to serve."""
        parameter = next(model.parameters())
        self.device, self.dtype = str(parameter.device), str(parameter.dtype).removeprefix("torch.")
        experts = [layer.experts for layer in layers.values()]
        self.expert_bytes = sum(each.total_bytes for each in experts)
        self.resident_bytes = sum(each.resident_bytes for each in experts)
        self.layers = {name: LayerTotals(name) for name in layers}
        loading = getattr(model, "loading", None)
        self.loading = None if loading is None else loading.as_dict()

    def count_hypotheses(self, hypotheses: list[list[dict]]) -> None:
        """Add one batch of a generator's results: per sentence its hypotheses, best first."""
        self.sentences += len(hypotheses)
        self.hypothesis_tokens += sum(len(sentence[0]["tokens"]) for sentence in hypotheses if sentence)

    def as_dict(self) -> dict:
        tokens = self.encoder.tokens + self.decoder.tokens
        peak_rss = peak_resident_bytes()
        peak_device = torch.cuda.max_memory_allocated() if self.device.startswith("cuda") else 0
        report = {
            "gating": self.gating,
            "world_size": 1,
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
            "peak_device_bytes": peak_device,
            "peak_rss_bytes": peak_rss,
            "expert_bytes_total": self.expert_bytes,
            "expert_bytes_resident": self.resident_bytes,
        }
        report["layers"] = [
            {
                "name": layer.name,
                "assignments": layer.assignments,
                "dropped": layer.dropped,
                "active_experts_mean": layer.active_experts_mean,
                "load": layer.load,
                **asdict(layer.buffer),
                "seconds": layer.seconds,
            }
            for layer in self.layers.values()
        ]
        buffer = self.buffer()
        rank = {"rank": 0, "tokens": tokens, "load_share": 1.0, "hits": buffer.hits, "misses": buffer.misses}
        report["ranks"] = [{**rank, "peak_rss_bytes": peak_rss}]
        return report

    def buffer(self) -> BufferTotals:
        """Of all layers together."""
        totals = BufferTotals()
        for layer in self.layers.values():
            totals.add(layer.buffer)
        return totals

    def summary(self) -> str:
        """One line for the log."""
        parts = [f"{self.gating} gating"]
        for name, totals in (("encoder", self.encoder), ("decoder", self.decoder)):
            if totals.steps:
                parts.append(f"{name} {totals.tokens:,} tokens at {totals.tokens_per_second:,.0f}/s")
        layers = [layer for layer in self.layers.values() if layer.calls]
        if layers:
            active = sum(layer.active_experts_mean for layer in layers) / len(layers)
            parts.append(f"{active:.1f} of {len(layers[0].load)} experts active in a pass")
        dropped, assignments = (sum(getattr(layer, name) for layer in layers) for name in ("dropped", "assignments"))
        parts.append(f"{dropped:,} of {assignments:,} assignments dropped")
        buffer = self.buffer()
        if buffer.hits + buffer.misses:
            share = buffer.misses / (buffer.hits + buffer.misses)
            parts.append(f"{share:.1%} of experts missed in the buffer, {buffer.bytes_copied / 1e9:,.2f} GB copied")
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
