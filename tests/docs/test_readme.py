"""The README stays short, and says what has never run."""

from doc_pages import REPOSITORY

README = REPOSITORY / "README.md"


def test_it_has_at_most_250_lines():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 250


def test_it_says_what_has_not_run_on_a_gpu_before_the_first_command():
    text = README.read_text(encoding="utf-8")
    head = text[: text.index("```")]
    assert "has run on a GPU" in head or "has never run on a GPU" in head
