"""What a setting costs in quality and gains in bytes and time: two settings of one model on your data.

    fairseq-moe compare model.pt "model.pt --moe-weights int4 --moe-weights-scope all" data-bin \\
        --source-lang en --target-lang de --gen-subset test --remove-bpe sentencepiece --json prices.json
    fairseq-moe compare lm.pt "lm.pt --moe-weights int8" lm-data --gen-subset test --tokens-per-sample 512
    fairseq-moe compare nllb.pt "nllb.pt --moe-weights int4" nllb-data --lang-pairs en-de,de-en --beam 4

A and B are a checkpoint as for --path and flags of fairseq-generate or fairseq-eval-lm, each in one quoted argument;
those after DATA hold for both. Every setting is served by that command in a process of its own, one after the other,
language pair by language pair. What the checkpoint says of its task need not be said again.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fairseq_moe_ext.atomic_file import write_json
from fairseq_moe_ext.command_line.comparison import NAMES, Comparison, Figures, Run, overview
from fairseq_moe_ext.command_line.parsing import command_parser, failed
from fairseq_moe_ext.command_line.translations import read_translations
from fairseq_moe_ext.reporting.routed_tokens import RoutedTokens

_PROGRAM = (
    "import sys; from fairseq_moe_ext.command_line import subcommand; "
    "sys.exit(subcommand('served_setting')(sys.argv[1:]))"
)
_ROOT = Path(__file__).resolve().parents[2]
# options of the commands that are compare's own to give, or that would leave it nothing to read -> why
_REFUSED = {
    "--path": "a setting begins with it",
    "--user-dir": "it is this plugin",
    "--task": "the checkpoint says it",
    "--moe-report": "compare reads the report, and --json writes what it says",
    "--moe-trace": "compare records the routing itself",
    "--score-reference": "compare scores the references beside",
    "--results-path": "compare reads what the command prints",
    "--quiet": "compare reads what the command prints",
    "--output-word-probs": "compare shows figures alone",
    "--output-word-stats": "compare shows figures alone",
    "--sacrebleu-char-level": "--sacrebleu-tokenizer char counts characters",
    "--distributed-world-size": "every setting is served by one process",
}
# what a check says of both settings, and what must be said where it differs
_ALIKE = {
    "task": "must be of one task",
    "part": "must serve the same languages and --gen-subset",
    "rows": "must have one dictionary, that is embeddings of as many words",
    "dictionaries": "must have one dictionary, of these checksums",
    "text": "must make text of tokens alike (--remove-bpe, --bpe, --tokenizer)",
    "tokenizer": "must be scored alike, by one --sacrebleu-tokenizer",
    "lowercase": "must be scored alike, both with --sacrebleu-lowercase or both without",
}


class CompareError(Exception):
    """A setting cannot be served, or cannot be compared with the other; one sentence."""


def main(arguments: Sequence[str] | None = None) -> int:
    """`fairseq-moe compare` with these arguments (default: the process's own); returns the exit code."""
    parser = command_parser("compare", __doc__)
    parser.allow_abbrev = False
    parser.usage = "fairseq-moe compare A B DATA [--lang-pairs PAIRS] [--json FILE] [the command's flags ...]"
    parser.add_argument("a", metavar="A", help="a checkpoint and its flags, in one argument")
    parser.add_argument("b", metavar="B", help="the same, or another copy of the model, with other flags")
    parser.add_argument("data", metavar="DATA", help="the folder that fairseq-preprocess made")
    parser.add_argument("--lang-pairs", metavar="PAIRS", help="en-de,en-fr: of a multilingual model, each pair apart")
    parser.add_argument("--json", metavar="FILE", help="write all figures")
    args, common = parser.parse_known_args(arguments)
    settings = {}
    for name, text in zip(NAMES, (args.a, args.b), strict=True):
        try:
            settings[name] = shlex.split(text)
        except ValueError as error:
            parser.error(f"{name} must be a checkpoint and flags as a shell reads them, got {text!r}: {error}")
        if not settings[name] or settings[name][0].startswith("-"):
            parser.error(f"{name} must begin with a checkpoint, got {text!r}")
        for word in (*common, *settings[name][1:]):
            if word.partition("=")[0] in _REFUSED:
                option = word.partition("=")[0]
                parser.error(f"{option} must not be given, in {name} or for both: {_REFUSED[option]}")
    pairs = [pair.split("-") for pair in (args.lang_pairs or "").split(",") if pair]
    if any(len(pair) != 2 or not all(pair) for pair in pairs) or (args.lang_pairs is not None and not pairs):
        parser.error(f"--lang-pairs must be pairs of languages such as en-de,en-fr, got {args.lang_pairs!r}")
    return _compare(settings, args.data, common, pairs, args.json)


def _compare(
    settings: dict[str, list[str]], data: str, common: list[str], pairs: list[list[str]], json_file: str | None
) -> int:
    """Serve and print; returns the exit code. What a setting gave is shown although the other fails."""
    for name, words in settings.items():
        print(f"{name}: {shlex.join(words)}")
    print(flush=True)
    done: list[Comparison] = []
    code = 0
    try:
        parts = _check(settings, data, common, pairs)
        for number, of_part in enumerate(zip(*parts.values(), strict=True)):
            runs: list[Run] = []
            try:
                for name, order in zip(NAMES, of_part, strict=True):
                    step = f"{name}, {order['part']} ({2 * number + len(runs) + 1} of {2 * len(parts['A'])})"
                    runs.append(_serve(name, step, order))
            finally:
                if runs:
                    done.append(Comparison.of_runs(of_part[0]["part"], runs))
                    print(done[-1].table() + "\n", flush=True)
    except (CompareError, ValueError, OSError) as error:
        code = failed(error)
    except KeyboardInterrupt:
        code = failed("interrupted", 130)
    whole = [each for each in done if each.changed_hypotheses is not None]
    if len(whole) > 1:
        print(overview(whole))
    if json_file is not None and done:
        content = {"settings": {name: shlex.join(words) for name, words in settings.items()}, "data": data}
        try:
            write_json(json_file, {**content, "parts": [each.as_dict() for each in done]}, "--json")
        except OSError as error:
            code = failed(error)
    return code


def _check(
    settings: dict[str, list[str]], data: str, common: list[str], pairs: list[list[str]]
) -> dict[str, list[dict[str, Any]]]:
    """Per setting and part what is to be run; CompareError where a setting is wrong, or not the other's kind."""
    _say("looking at A and B")
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        checks = [
            {"folder": folder, "name": name, "path": path, "data": data, "flags": [*common, *flags], "pairs": pairs}
            for name, (path, *flags) in settings.items()
        ]
        done = _run({"checks": checks})
        for name in NAMES:
            file = Path(folder, f"{name}.json")
            if not file.is_file():
                raise CompareError(f"{name} cannot be served, and nothing was served: looking at it {_ended(done)}")
            found[name] = json.loads(file.read_text(encoding="utf-8"))
    for a, b in zip(found["A"], found["B"], strict=True):
        for field, rule in _ALIKE.items():
            if a[field] != b[field]:
                raise CompareError(f"A and B {rule}, got {_shown(a[field])} and {_shown(b[field])}")
    return found


def _serve(name: str, step: str, order: dict[str, Any]) -> Run:
    """Run fairseq's command; CompareError where it fails, after its own error."""
    command = f"fairseq-{order['command'].replace('_', '-')}"
    _say(f"{step}: {command} serves")
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        done = _run({"serve": {"folder": folder, "command": order["command"], "arguments": order["arguments"]}})
        if done.returncode != 0:
            raise CompareError(f"{name} cannot be served: {command} {_ended(done)}")
        report, scored = (
            json.loads(Path(folder, file).read_text(encoding="utf-8")) for file in ("report.json", "figures.json")
        )
        routed = RoutedTokens.unpack(Path(folder, "routing.npz").read_bytes())
    translations = read_translations(done.stdout) if order["command"] == "generate" else None
    figures = Figures.of_run(scored, report, translations, order["tokenizer"], order["lowercase"])
    _say(f"{step}: done in {time.perf_counter() - start:,.0f} s")
    return Run(figures, translations, routed)


def _run(order: dict[str, Any]) -> subprocess.CompletedProcess:
    """A process of its own; its progress and its errors are seen as it goes."""
    path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {"PYTHONWARNINGS": "ignore", **os.environ, "PYTHONPATH": path, "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-c", _PROGRAM, json.dumps(order)]
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=environment, encoding="utf-8", check=False
    )


def _ended(done: subprocess.CompletedProcess) -> str:
    if done.returncode < 0:
        return f"was ended by signal {-done.returncode}"
    return f"ended with exit code {done.returncode}, its error stands above"


def _shown(value: Any) -> str:
    return ", ".join(str(each)[:12] for each in value) if isinstance(value, list) else str(value)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
