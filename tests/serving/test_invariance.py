"""What a sentence gets does not depend on its batch-mates, nor, in a language model, on the tokens that come later.

Dynamic gating has both properties; static gating under a finite capacity has neither. The
tests of static gating print how far it is off: `pytest -s -k static tests/serving/test_invariance.py`.
"""

import commands
import numpy as np
import pytest
import torch
from ties import Hypothesis, assert_same_hypotheses

QUANTIZED = (("--moe-weights", "int8"), ("--moe-weights", "int4"))
STATIC = ("--moe-gating", "static", "--moe-eval-capacity-token-fraction")


def evaluate(goldens, rows: int, *flags) -> dict[int, np.ndarray]:
    folder = goldens / "lm_top2"
    path = ("--path", folder / "checkpoint_last.pt", "--batch-size", rows)
    return commands.eval_lm(folder / "data-bin", *path, *commands.LM, *flags).by_id()


def largest_change(some: dict[int, np.ndarray], others: dict[int, np.ndarray]) -> float:
    """Of any token's log-probability; rows may have been padded to another length."""
    assert some.keys() == others.keys()
    return max(float(np.abs(some[number] - others[number]).max()) for number in some)


def change_before_the_middle(goldens, *flags) -> float:
    """Largest change of a log-probability in rows' first halves when other tokens stand in their second halves."""
    folder = goldens / "lm_top2"
    arguments = (folder / "data-bin", "--path", folder / "checkpoint_last.pt", *commands.LM, *flags)
    model, task = commands.load("eval_lm", *arguments)
    with np.load(folder / "golden" / "eval_b8_cap0.05.npz") as arrays:
        tokens = torch.from_numpy(arrays["b0/src_tokens"]).long()  # (8, 128)
    other = tokens.clone()
    generator = torch.Generator().manual_seed(0)
    other[:, 64:] = torch.randint(4, len(task.target_dictionary), (8, 64), generator=generator)
    with torch.no_grad():
        some, others = (model.get_normalized_probs(model(batch), log_probs=True)[:, :64] for batch in (tokens, other))
    return float((some - others).abs().max())


class Translator:
    """A served translation model and its test sentences, translated or scored in any company."""

    def __init__(self, goldens, name: str, *flags):
        folder = goldens / name
        nllb = name == "mt_nllb_ws2"
        arguments = (*commands.NLLB, "-t", "de") if nllb else commands.MT
        arguments = (folder / "data-bin", "--path", folder / "checkpoint_last.pt", *arguments, *flags)
        self.model, self.task = commands.load("generate", *arguments)
        self.task.load_dataset("test")
        self.dataset = self.task.dataset("test")
        self.generation = commands.parse("generate", *arguments).generation
        self.sentences = np.random.RandomState(0).permutation(100)[:12].tolist()

    def batches(self, rows: int) -> list[dict]:
        chunks = [self.sentences[i : i + rows] for i in range(0, len(self.sentences), rows)]
        return [self.dataset.collater([self.dataset[number] for number in chunk]) for chunk in chunks]

    def translate(self, rows: int) -> dict[int, tuple[list[int], float]]:
        """Per sentence its best hypothesis and the score, `rows` sentences at a time."""
        generator = self.task.build_generator([self.model], self.generation)
        found = {}
        for batch in self.batches(rows):
            for number, hypotheses in zip(
                batch["id"].tolist(), self.task.inference_step(generator, [self.model], batch), strict=True
            ):
                found[number] = (hypotheses[0]["tokens"].tolist(), float(hypotheses[0]["score"]))
        return found

    @torch.no_grad()
    def score(self, rows: int) -> dict[int, np.ndarray]:
        """Per sentence the log-probabilities of its reference."""
        found = {}
        for batch in self.batches(rows):
            scores = self.model.get_normalized_probs(self.model(**batch["net_input"]), log_probs=True)
            scores = scores.gather(2, batch["target"].unsqueeze(2)).squeeze(2)
            for number, row, target in zip(batch["id"].tolist(), scores, batch["target"], strict=True):
                found[number] = row[target != 1].numpy()
        return found


def test_dynamic_language_model_scores_a_block_alone_as_among_others(shared_goldens):
    assert largest_change(evaluate(shared_goldens, 8), evaluate(shared_goldens, 1)) < 1e-5


@pytest.mark.parametrize("flags", QUANTIZED)
def test_quantised_experts_score_a_block_alone_as_among_others(shared_goldens, flags):
    """Bit by bit for the experts (tests/kernels/test_quantized.py); where another product before them is rounded by the
    number of rows, a value at the edge of two codes may become the other."""
    many, one = (evaluate(shared_goldens, rows, *flags) for rows in (8, 1))
    assert many.keys() == one.keys()
    assert np.median(np.abs(np.concatenate([many[number] - one[number] for number in many]))) < 1e-5
    assert largest_change(many, one) < 0.5


@pytest.mark.slow
def test_static_language_model_scores_a_block_alone_unlike_among_others(shared_goldens):
    change = largest_change(evaluate(shared_goldens, 8, *STATIC, 0.05), evaluate(shared_goldens, 1, *STATIC, 0.05))
    print(f"lm_top2, static 0.05: a log-probability changes by up to {change:.2f} nats between batch 8 and batch 1")
    assert change > 0.5


@pytest.mark.parametrize("flags", [(), *QUANTIZED])
def test_dynamic_language_model_does_not_see_the_future(shared_goldens, flags):
    assert change_before_the_middle(shared_goldens, *flags) < 1e-5


def test_static_language_model_sees_the_future(shared_goldens):
    change = change_before_the_middle(shared_goldens, *STATIC, 0.05)
    print(f"lm_top2, static 0.05: later tokens change an earlier log-probability by up to {change:.2f} nats")
    assert change > 0.5


@pytest.mark.parametrize("model", ["mt_plain", pytest.param("mt_nllb_ws2", marks=pytest.mark.slow)])
def test_dynamic_translation_of_a_sentence_is_the_same_in_any_company(shared_goldens, model):
    translator = Translator(shared_goldens, model)
    together, alone = translator.translate(12), translator.translate(1)
    assert together.keys() == alone.keys()
    assert_same_hypotheses(*([[Hypothesis(*found[number])] for number in alone] for found in (together, alone)))
    assert largest_change(translator.score(12), translator.score(1)) < 1e-5


def test_static_translation_of_a_sentence_changes_with_its_company(shared_goldens):
    translator = Translator(shared_goldens, "mt_plain", *STATIC, 0.1)
    together, alone = translator.translate(12), translator.translate(1)
    others = sum(together[number][0] != alone[number][0] for number in together)
    score = max(abs(together[number][1] - alone[number][1]) for number in together)
    change = largest_change(translator.score(12), translator.score(1))
    print(
        f"mt_plain, static 0.1: {others} of {len(together)} translations differ between batch 12 and batch 1, their"
        f" mean scores by up to {score:.2f} nats; a reference token's log-probability by up to {change:.2f} nats"
    )
    assert others > 0
    assert change > 0.5
