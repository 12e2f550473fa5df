"""Runs of fairseq's commands with a report and a trace, of which finished ones are reused."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fairseq_cli import eval_lm, generate

from fairseq_moe_ext.atomic_file import write_json
from fairseq_moe_ext.command_line.translations import translation_quality
from fairseq_moe_ext.trace import PhaseTrace, load_trace, save_trace
from reproduction.models import ROOT, Model, arguments_of, configuration


@dataclass(frozen=True)
class Run:
    """What a served data set told: its quality (perplexity; or bleu and chrf), `--moe-report`, `--moe-trace`."""

    quality: dict[str, float]
    report: dict
    trace: dict[str, PhaseTrace]


class RunError(RuntimeError):
    """A command of fairseq failed; the message ends with what it said."""


def remembered(file: Path, identity: dict, run: Callable[[], Any]) -> Any:
    """What `run()` gave, as JSON, from `file` where that is of the same `identity`."""
    if file.is_file():
        known = json.loads(file.read_text(encoding="utf-8"))
        if known["identity"] == identity:
            return known["result"]
    result = run()
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"identity": identity, "result": result})
    return result


def identity_of(model: Model, arguments: list[str], ranks: int) -> dict:
    """What a finished run must have in common with the one that is wanted."""
    stat = model.checkpoint.stat() if model.checkpoint.is_file() else None
    return {"arguments": arguments, "ranks": ranks, "file": stat and [stat.st_size, stat.st_mtime_ns]}


def run(
    folder: Path,
    model: Model,
    subset: str,
    flags: Sequence[str] = (),
    rows: int | None = None,
    ranks: int = 1,
    fresh: bool = False,
) -> Run:
    """Serve `subset` of a model's data; from `folder` where it was done before.

    folder: of all runs, of whichever script. flags: more of the command's. rows: another batch than the model's.
    ranks: processes, by torchrun. fresh: in a process of its own, so that its peak memory is its own (`ranks` above 1
    always are); else in this one, which saves starting it. RunError where the command fails.
    """
    arguments = arguments_of(model, subset, rows) + [str(flag) for flag in flags]
    fresh = fresh or ranks > 1
    name = "_".join(
        re.sub(r"[^\w.=]+", "-", part).strip("-")
        for part in (subset, f"batch-{rows or model.rows}", f"ranks-{ranks}", *["fresh"] * fresh, *map(_short, flags))
    )
    file = folder / model.name / f"{name}.json"
    trace = file.with_suffix(".npz")

    def serve_and_save() -> dict:
        found = _serve_fresh(model, arguments, ranks) if fresh else serve(model, arguments)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.unlink(missing_ok=True)  # never one run's report beside another's trace
        save_trace(trace, found.trace)
        return {"quality": found.quality, "report": found.report}

    identity = identity_of(model, arguments, ranks)
    if not trace.is_file():
        file.unlink(missing_ok=True)
    return Run(**remembered(file, identity, serve_and_save), trace=load_trace(trace))


def _short(flag: str) -> str:
    """A flag's part of a file's name; of a path its last part."""
    return Path(str(flag)).name


def serve(model: Model, arguments: list[str]) -> Run:
    """One run in this process."""
    with tempfile.TemporaryDirectory() as folder:
        report, trace = Path(folder) / "report.json", Path(folder) / "trace.npz"
        arguments = [*arguments, "--moe-report", str(report), "--moe-trace", str(trace), "--log-format", "none"]
        cfg = configuration(arguments, model.translates)
        if model.translates:
            output = io.StringIO()
            generate._main(cfg, output)
            quality = translation_quality(output.getvalue())
        else:
            quality = {"perplexity": 2 ** float(eval_lm.main(cfg)["loss"])}
        return Run(quality, json.loads(report.read_text()), load_trace(trace))


def _serve_fresh(model: Model, arguments: list[str], ranks: int) -> Run:
    """One run in processes of their own."""
    with tempfile.TemporaryDirectory() as folder:
        report, trace = Path(folder) / "report.json", Path(folder) / "trace.npz"
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
        module = "fairseq_cli.generate" if model.translates else "fairseq_cli.eval_lm"
        command = [sys.executable, *launcher, "-m", module, *arguments, "--user-dir", str(ROOT / "fairseq_moe_ext")]
        command += ["--moe-report", str(report), "--moe-trace", str(trace)]
        done = run_command(command)
        if model.translates:
            quality = translation_quality(done.stdout)
        else:
            (loss,) = re.findall(r"Loss \(base 2\): ([\d.]+)", done.stderr)
            quality = {"perplexity": 2 ** float(loss)}
        return Run(quality, json.loads(report.read_text()), load_trace(trace))


def run_command(command: Sequence[str]) -> subprocess.CompletedProcess:
    """A process with one thread from the repository's root; RunError with the end of its stderr where it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env=environment, cwd=ROOT)
    if done.returncode != 0:
        raise RunError(f"{shlex.join(command)} failed:\n{done.stderr[-3000:]}")
    return done
