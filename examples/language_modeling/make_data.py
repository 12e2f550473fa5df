#!/usr/bin/env python3
"""Write a small corpus of real text for a language model, without a download: Python's own standard library.

The sources of the running Python's standard library (tests and installed packages left out) are split by file
into training, validation and test text: `train.txt`, `valid.txt` and `test.txt` in --output, one line of code
a line, blank lines left out, tokens apart by spaces. As in BPE, `@@` ends a token that goes on without a
space:

    if self.closed:    ->    if self@@ .@@ closed@@ :

The --words most frequent words and signs of the training text are tokens; everything else is spelled by
character, so the dictionary stays small and there are no unknown words. `sed 's/@@ //g'` (fairseq:
--post-process subword_nmt) gives the line back without its indentation. Lines with other than printable ASCII
characters are left out.

The same seed, sizes and Python version give the same files; another Python version has another library.
"""

import argparse
import random
import re
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from fairseq_moe_ext.atomic_file import write_text  # noqa: E402

LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
PIECE = re.compile(r"[A-Za-z]+|.")


def source_files(root: Path) -> list[Path]:
    """The library's .py files in a fixed order, LEFT_OUT folders excepted."""
    files = (path for path in root.rglob("*.py") if not LEFT_OUT.intersection(path.relative_to(root).parts))
    return sorted(files)


def read_lines(path: Path) -> list[str]:
    """The file's lines without indentation; only those of printable ASCII."""
    text = path.read_text(encoding="utf-8", errors="replace")
    stripped = (" ".join(line.split()) for line in text.splitlines())
    return [line for line in stripped if line and line.isascii() and line.isprintable()]


def split_words(line: str) -> list[str]:
    """Split a line into words and signs; `@@` marks what goes on without a space.

    >>> split_words("if self.fd:")
    ['if', 'self@@', '.@@', 'fd@@', ':']
    """
    pieces = []
    for chunk in line.split():
        *head, last = PIECE.findall(chunk)
        pieces += [piece + "@@" for piece in head] + [last]
    return pieces


def frequent_words(lines: Iterable[str], count: int) -> frozenset[str]:
    """The `count` most frequent words of the lines, "self" and "self@@" apart; ties in alphabetical order.

    They are counted with their marks, so that every token of another text occurs in this one too.
    """
    seen = Counter(word for line in lines for word in split_words(line))
    return frozenset(sorted(seen, key=lambda word: (-seen[word], word))[:count])


def tokenize(line: str, words: frozenset[str]) -> str:
    """Split a line into tokens: `words` as they are, everything else by character.

    >>> tokenize("if self.fd:", frozenset({"if", "self@@"}))
    'if self@@ .@@ f@@ d@@ :'
    """
    tokens = []
    for word in split_words(line):
        if word in words:
            tokens.append(word)
        else:
            text = word.removesuffix("@@")
            tokens += [letter + "@@" for letter in text[:-1]] + [text[-1] + word[len(text) :]]
    return " ".join(tokens)


def take_files(files: Iterable[Path], limit: int) -> list[str]:
    """Lines of whole files, until there are `limit` characters or no more files."""
    lines: list[str] = []
    size = 0
    for path in files:
        if size >= limit:
            break
        new = read_lines(path)
        lines += new
        size += sum(map(len, new))
    return lines


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write lines to path; the file appears under its name only when it is complete."""
    write_text(path, "".join(line + "\n" for line in lines))


def positive(text: str) -> int:
    """argparse type: an integer above zero."""
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be an integer above 0, got {text!r}")
    return int(text)


def parse_args() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(description="Write language-model text from Python's standard library.")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder to write")
    size = {"type": positive, "metavar": "N"}
    parser.add_argument("--train", default=3_000_000, **size, help="least characters (default %(default)s)")
    parser.add_argument("--valid", default=60_000, **size, help="least characters (default %(default)s)")
    parser.add_argument("--test", default=60_000, **size, help="least characters (default %(default)s)")
    parser.add_argument("--words", default=2_000, **size, help="words kept whole (default %(default)s)")
    parser.add_argument("--seed", default=1, type=int, help="seed of the split (default %(default)s)")
    return parser, parser.parse_args()


def main() -> None:
    parser, args = parse_args()
    root = Path(sysconfig.get_path("stdlib"))
    files = source_files(root)
    random.Random(args.seed).shuffle(files)
    remaining = iter(files)
    splits = {split: take_files(remaining, getattr(args, split)) for split in ("test", "valid", "train")}
    for split, lines in splits.items():
        if sum(map(len, lines)) < getattr(args, split):
            parser.error(f"--{split} must be at most what is left of {root}, got {getattr(args, split)}")

    words = frequent_words(splits["train"], args.words)
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        for split, lines in splits.items():
            write_lines(args.output / f"{split}.txt", (tokenize(line, words) for line in lines))
    except OSError as error:
        parser.error(f"--output must be a folder that can be written, got {args.output}: {error}")
    print(f"{args.output}: {', '.join(f'{len(lines)} {split}' for split, lines in splits.items())} lines")


if __name__ == "__main__":
    main()
