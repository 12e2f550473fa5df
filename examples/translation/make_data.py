#!/usr/bin/env python3
"""Write a small real parallel corpus, English -> German, French, Spanish and Japanese, without a download.

The text comes from Babel's copy of the Unicode CLDR tables: dates, times, numbers with units, amounts of
money, relative days, names of languages and of territories, each in English and in one of the four languages.
One multilingual model learns them all: the first token of a source line names the language to translate into.

    en  __de__ in 4 2 days
    xx  in 4 2 Tagen

Files in --output: {train,valid,test}.en and {train,valid,test}.xx, one sentence a line, tokens apart by
spaces. Tokens are whole words, single digits, single kanji, runs of kana and single signs: there are about
750 of them, and no subword model is needed. BLEU on these files is BLEU on these tokens.

Every English sentence occurs once in the three splits together, the language tag not counted: a test sentence
is in training neither for its own language nor for another, and no sentence has two references. The same
seed, sizes and Babel version give the same files; the test set is drawn first and does not change with the
sizes of the other two.
"""

import argparse
import datetime
import random
import re
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

try:
    from babel import Locale, dates, lists, numbers, units
except ImportError:
    sys.exit("make_data.py: the CLDR tables come with Babel, which is not installed: pip install Babel")

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from fairseq_moe_ext.atomic_file import write_text  # noqa: E402

SOURCE = "en"
TARGETS = ("de", "fr", "es", "ja")

LANGUAGES = (
    "en de fr es ja it pt ru zh ar hi ko tr pl nl sv da fi el he hu cs ro uk vi th id fa sw ta "
    "te bn ur ms ca hr sk bg lt lv et sl sq hy ka az kk uz mn ne km lo my is ga cy eu gl mt la"
).split()
TERRITORIES = (
    "DE FR ES JP US GB IT PT RU CN IN BR MX CA AU AR CL PE CO EG MA ZA NG KE "
    "ET TR GR PL SE NO DK FI IS IE NL BE CH AT HU CZ RO UA TH VN ID PH KR NZ"
).split()
CURRENCIES = "USD EUR JPY GBP CHF SEK INR MXN".split()
# Durations are left out: for Japanese Babel answers "7 duration-hour".
UNITS = (
    "length-kilometer length-meter length-centimeter length-mile mass-kilogram mass-gram volume-liter "
    "temperature-celsius speed-kilometer-per-hour digital-megabyte area-square-meter energy-kilowatt-hour"
).split()

KANJI, HIRAGANA, KATAKANA = "\u3005\u3400-\u9fff", "\u3041-\u309f", "\u30a0-\u30ff"
TOKEN = re.compile(
    rf"\d|[{KANJI}]|[{HIRAGANA}]+|[{KATAKANA}]+"  # a digit, a kanji, a run of kana
    rf"|[^\W\d_{KANJI}{HIRAGANA}{KATAKANA}]+|\S"  # a word of any other script, any other sign
)

Render = Callable[[str], str]
"""What a sentence says, as a function from a locale to the sentence in that language."""


def tokenize(text: str) -> list[str]:
    """Split text into tokens.

    >>> tokenize("1.234,5 Kilometer"), tokenize("2014年ユーロ")
    (['1', '.', '2', '3', '4', ',', '5', 'Kilometer'], ['2', '0', '1', '4', '年', 'ユーロ'])
    """
    return TOKEN.findall(text)


def draw_number(rng: random.Random) -> float:
    """A positive number of one to four digits; a third of them with one decimal."""
    whole = rng.randrange(2, 10 ** rng.randint(1, 4))
    return whole + rng.randint(1, 9) / 10 if rng.random() < 1 / 3 else whole


def draw_date(rng: random.Random) -> Render:
    day = datetime.date(1950, 1, 1) + datetime.timedelta(days=rng.randrange(36_500))
    # Shorter styles give two references for one source: "May 5, 2014" is both long and medium in English.
    style = rng.choice(("long", "full"))
    return lambda locale: dates.format_date(day, style, locale=locale)


def draw_time(rng: random.Random) -> Render:
    time = datetime.time(rng.randrange(24), rng.randrange(60))
    return lambda locale: dates.format_time(time, "short", locale=locale)


def draw_date_and_time(rng: random.Random) -> Render:
    date, time = draw_date(rng), draw_time(rng)

    def render(locale: str) -> str:
        pattern = str(dates.get_datetime_format("medium", locale=locale)).replace("'", "")
        return pattern.format(time(locale), date(locale))

    return render


def draw_relative_day(rng: random.Random) -> Render:
    days = rng.choice((-1, 1)) * rng.randrange(2, 400)
    delta = datetime.timedelta(days=days)
    return lambda locale: dates.format_timedelta(
        delta, granularity="day", threshold=1e9, add_direction=True, locale=locale
    )


def draw_unit(rng: random.Random) -> Render:
    value, unit = draw_number(rng), rng.choice(UNITS)
    return lambda locale: units.format_unit(value, unit, "long", locale=locale)


def draw_money(rng: random.Random) -> Render:
    value, currency = int(draw_number(rng)), rng.choice(CURRENCIES)
    return lambda locale: numbers.format_currency(
        value, currency, locale=locale, format_type="name", currency_digits=False
    )


def draw_language(rng: random.Random) -> Render:
    code = rng.choice(LANGUAGES)
    return lambda locale: Locale.parse(locale).languages[code]


def draw_territory(rng: random.Random) -> Render:
    code = rng.choice(TERRITORIES)
    return lambda locale: Locale.parse(locale).territories[code]


def draw_regional_language(rng: random.Random) -> Render:
    """A language as spoken in a territory, "German (Austria)": CLDR's pattern is the same in all five."""
    language, territory = draw_language(rng), draw_territory(rng)
    return lambda locale: f"{language(locale)} ({territory(locale)})"


def draw_list(rng: random.Random, draw_item: Callable[[random.Random], Render], longest: int) -> Render:
    """Two to `longest` different items of one kind, joined as the language joins them: "A, B and C"."""
    count = rng.randint(2, longest)
    items: dict[str, Render] = {}
    while len(items) < count:
        item = draw_item(rng)
        items[item(SOURCE)] = item
    style = rng.choice(("standard", "or"))
    return lambda locale: lists.format_list([item(locale) for item in items.values()], style, locale=locale)


KINDS: tuple[tuple[int, Callable[[random.Random], Render]], ...] = (
    (4, draw_date),
    (4, draw_date_and_time),
    (1, draw_relative_day),
    (4, draw_unit),
    (4, draw_money),
    (3, draw_regional_language),
    (2, lambda rng: draw_list(rng, draw_unit, 2)),
    (2, lambda rng: draw_list(rng, draw_money, 2)),
    (4, lambda rng: draw_list(rng, draw_language, 4)),
    (4, lambda rng: draw_list(rng, draw_territory, 4)),
    (2, lambda rng: draw_list(rng, draw_regional_language, 2)),
)
"""How often each kind of sentence is drawn, and how."""


def draw_pairs(seed: int) -> Iterator[tuple[str, str]]:
    """Yield (source, target) lines without end of new sentences, each English sentence once.

    Stops when 10,000 draws in a row gave nothing new.
    """
    rng = random.Random(seed)
    weights, kinds = zip(*KINDS, strict=True)
    seen: set[str] = set()
    misses = 0
    while misses < 10_000:
        render = rng.choices(kinds, weights)[0](rng)
        target_language = rng.choice(TARGETS)
        source = " ".join(tokenize(render(SOURCE)))
        if source in seen:
            misses += 1
            continue
        misses = 0
        seen.add(source)
        yield f"__{target_language}__ {source}", " ".join(tokenize(render(target_language)))


def write_lines(path: Path, lines: list[str]) -> None:
    """Write lines to path; the file appears under its name only when it is complete."""
    write_text(path, "".join(line + "\n" for line in lines))


def positive(text: str) -> int:
    """argparse type: an integer above zero."""
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be an integer above 0, got {text!r}")
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write an English -> de, fr, es, ja corpus from CLDR.")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder to write")
    parser.add_argument("--train", default=30_000, type=positive, metavar="N", help="pairs (%(default)s)")
    parser.add_argument("--valid", default=400, type=positive, metavar="N", help="pairs (%(default)s)")
    parser.add_argument("--test", default=400, type=positive, metavar="N", help="pairs (%(default)s)")
    parser.add_argument("--seed", default=1, type=int, help="seed of the draw (%(default)s)")
    args = parser.parse_args()

    pairs = draw_pairs(args.seed)
    splits = {split: list(islice(pairs, getattr(args, split))) for split in ("test", "valid", "train")}
    drawn = sum(map(len, splits.values()))
    wanted = args.train + args.valid + args.test
    if drawn < wanted:
        parser.error(f"--train + --valid + --test must be at most {drawn}, the sentences found, got {wanted}")
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        for split, rows in splits.items():
            write_lines(args.output / f"{split}.en", [source for source, _ in rows])
            write_lines(args.output / f"{split}.xx", [target for _, target in rows])
    except OSError as error:
        parser.error(f"--output must be a folder that can be written, got {args.output}: {error}")
    print(f"{args.output}: {', '.join(f'{len(rows)} {split}' for split, rows in splits.items())} pairs")


if __name__ == "__main__":
    main()
