"""Two settings of one model on one part of the data: what came of each, how they differ, and both as tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tabulate import tabulate

from fairseq_moe_ext.command_line.translations import Translations
from fairseq_moe_ext.reporting.routed_tokens import Agreement, RoutedTokens, agreements

NAMES = ("A", "B")
_HEADER = ("", *NAMES, "change")


@dataclass(frozen=True)
class Figures:
    """One setting. perplexity: of a translation model that of the references. translations: None for a language model.
    chrf: chrF++. length_ratio: characters of the hypotheses over those of the references. Bytes as in the report, dense
    ones as they lie in memory."""

    perplexity: float
    scored_tokens: int
    bleu: float | None
    chrf: float | None
    length_ratio: float | None
    expert_format: str
    expert_bytes: int
    dense_bytes: int
    peak_rss_bytes: int
    peak_device_bytes: int
    encoder_tokens_per_second: float | None
    decoder_tokens_per_second: float

    @classmethod
    def of_run(
        cls,
        scored: Mapping[str, Any],
        report: Mapping[str, Any],
        found: Translations | None,
        tokenizer: str,
        lower: bool,
    ) -> Figures:
        """scored: perplexity, tokens and dense bytes. report: of `--moe-report`. tokenizer, lower: of sacrebleu."""
        memory = report["memory"]
        return cls(
            **scored,
            bleu=None if found is None else found.bleu(tokenizer, lower),
            chrf=None if found is None else found.chrf(2, lower),
            length_ratio=None if found is None else found.length_ratio,
            expert_format=report["expert_format"],
            expert_bytes=memory["expert_bytes_total"],
            peak_rss_bytes=memory["peak_rss_bytes"],
            peak_device_bytes=memory["peak_device_bytes"],
            encoder_tokens_per_second=report.get("encoder", {}).get("tokens_per_second"),
            decoder_tokens_per_second=report["decoder"]["tokens_per_second"],
        )


@dataclass(frozen=True)
class Run:
    """What one setting gave."""

    figures: Figures
    translations: Translations | None
    routed: RoutedTokens


@dataclass(frozen=True)
class Comparison:
    """part: the language pair, or the data set. figures: of the settings that were served, A first. changed_hypotheses:
    the share of sentences whose best hypothesis is another text; None unless both have translated."""

    part: str
    sentences: int
    figures: tuple[Figures, ...]
    changed_hypotheses: float | None
    agreements: tuple[Agreement, ...]

    @classmethod
    def of_runs(cls, part: str, runs: Sequence[Run]) -> Comparison:
        """One run or both; ValueError where both are not of the same sentences and references."""
        changed, found = None, []
        if len(runs) == 2:
            found = agreements(*(run.routed for run in runs))
            a, b = (run.translations for run in runs)
            if a is not None and b is not None:
                if (a.numbers, a.references) != (b.numbers, b.references):
                    raise ValueError(
                        "both must have the same references, got others: what makes texts of tokens (--remove-bpe, "
                        "--bpe, --tokenizer) must be alike"
                    )
                pairs = zip(a.hypotheses, b.hypotheses, strict=True)
                changed = sum(one != other for one, other in pairs) / len(a.numbers)
        sentences = len(runs[0].routed.sentences)
        return cls(part, sentences, tuple(run.figures for run in runs), changed, tuple(found))

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        named = {name: asdict(each) for name, each in zip(NAMES, self.figures, strict=False)}
        for figures in named.values():
            figures["chrf++"] = figures.pop("chrf")
        routing = [asdict(each) for each in self.agreements]
        more = {"changed_hypotheses": self.changed_hypotheses, "routing": routing}
        return {"part": self.part, "sentences": self.sentences, **named, **more}

    def table(self) -> str:
        """Both settings side by side, and how far their routing agrees in every layer."""
        translates = self.figures[0].bleu is not None
        rows = [
            self._row("BLEU", "bleu", "{:.2f}".format, _difference(2)),
            self._row("chrF++", "chrf", "{:.2f}".format, _difference(2)),
            self._row("perplexity of the references" if translates else "perplexity", "perplexity", _four, _percent),
            self._row("hypothesis/reference, characters", "length_ratio", "{:.3f}".format, _difference(3)),
            *([("changed hypotheses", "", "", _share(self.changed_hypotheses))] if translates else []),
            ("experts' format", *self._cells("expert_format", str), ""),
            self._row("experts", "expert_bytes", _megabytes, _times),
            self._row("dense part", "dense_bytes", _megabytes, _times),
            self._row("peak memory of the process", "peak_rss_bytes", _megabytes, _times),
            self._row("peak memory of the GPU", "peak_device_bytes", _megabytes, _times),
            self._row("encoder, tokens/s", "encoder_tokens_per_second", "{:,.0f}".format, _times),
            self._row("decoder, tokens/s", "decoder_tokens_per_second", "{:,.0f}".format, _times),
        ]
        units = ("sentences", "tokens of references") if translates else ("blocks", "tokens")
        head = f"{self.part}: {self.sentences:,} {units[0]}, {self.figures[0].scored_tokens:,} {units[1]}"
        tables = [head, _markdown(list(filter(None, rows)), _HEADER)]
        if self.agreements:
            header = ("layer", "tokens", "same experts", "same first choice")
            shares = [
                (each.layer, f"{each.tokens:,}", _share(each.same_experts), _share(each.same_first_choice))
                for each in self.agreements
            ]
            tables.append(_markdown(shares, header))
        return "\n\n".join(tables)

    def _row(self, label: str, name: str, shown: Callable, change: Callable) -> tuple[str, ...] | None:
        values = [getattr(figures, name) for figures in self.figures]
        if not any(values):  # no such figure here
            return None
        return label, *self._cells(name, shown), change(*values) if len(values) == 2 else ""

    def _cells(self, name: str, shown: Callable) -> list[str]:
        cells = [shown(getattr(figures, name)) for figures in self.figures]
        return cells + [""] * (len(NAMES) - len(cells))


def overview(comparisons: Sequence[Comparison]) -> str:
    """A line for every language pair that both settings have translated."""
    header = ("pair", "BLEU A", "BLEU B", "change", "chrF++ A", "chrF++ B", "change", "changed hypotheses")
    rows = []
    for each in comparisons:
        cells = []
        for name in ("bleu", "chrf"):
            values = [getattr(figures, name) for figures in each.figures]
            cells += [*map("{:.2f}".format, values), _difference(2)(*values)]
        rows.append((each.part, *cells, _share(each.changed_hypotheses)))
    return _markdown(rows, header)


def _markdown(rows: Sequence[Sequence[str]], header: Sequence[str]) -> str:
    aligned = ("left", *("right",) * (len(header) - 1))
    return tabulate(rows, header, tablefmt="github", disable_numparse=True, colalign=aligned)


def _difference(digits: int) -> Callable[[float, float], str]:
    return lambda a, b: f"{b - a:+.{digits}f}"


def _percent(a: float, b: float) -> str:
    return f"{b / a - 1:+.2%}"


def _times(a: float, b: float) -> str:
    return f"x {b / a:.2f}" if a else ""


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}"


def _four(value: float) -> str:
    return f"{value:.4f}"


def _megabytes(value: int) -> str:
    return f"{value / 1e6:,.2f} MB"
