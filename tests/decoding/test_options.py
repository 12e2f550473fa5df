"""The plugin's generator loses nothing of fairseq's: the same hypotheses and scores under every search option.

Both generators run over the same served models; the plugin's is the one that its task builds from the command line.
"""

import math
from argparse import Namespace
from copy import deepcopy

import commands
import numpy as np
import pytest
import torch
from data_makers import LM_TRAINING, untrained_checkpoint, write_data
from fairseq import checkpoint_utils, search, tasks
from fairseq.models.transformer_lm import TransformerLanguageModel, base_lm_architecture
from fairseq.ngram_repeat_block import NGramRepeatBlock
from fairseq.sequence_generator import SequenceGenerator, SequenceGeneratorWithAlignment
from fairseq.token_generation_constraints import pack_constraints
from ties import of_tokens, paired

from fairseq_moe_ext.decoding.generator import MoESequenceGenerator, MoESequenceGeneratorWithAlignment, RepeatBlock
from fairseq_moe_ext.models.moe_transformer_lm import MoETransformerLanguageModel, moe_transformer_lm_tiny

MODELS = ("mt_plain", "mt_nllb_ws2")


class Served:
    """A golden translation model, its task, and some of its test sentences."""

    def __init__(self, goldens, name: str):
        self.folder = goldens / name
        self.flags = commands.MT if name == "mt_plain" else (*commands.NLLB, "-t", "de")
        self.cfg = self.parse()
        self.task = tasks.setup_task(self.cfg.task)
        self.model = self.load("checkpoint_last.pt")
        self.task.load_dataset("test")
        self.dictionary = self.task.target_dictionary
        self.beams = texts(self.ours())  # of plain beam search
        self.strip = {self.dictionary.index("__de__")} if name == "mt_nllb_ws2" else None

    def parse(self, *flags):
        path = ("--path", self.folder / "checkpoint_last.pt")
        return commands.parse("generate", self.folder / "data-bin", *path, *self.flags, *flags)

    def load(self, file: str):
        models, _ = checkpoint_utils.load_model_ensemble([str(self.folder / file)], task=self.task)
        models[0].eval()
        models[0].prepare_for_inference_(self.cfg)
        return models[0]

    def batch(self, rows: int = 4) -> dict:
        dataset = self.task.dataset("test")
        sample = dataset.collater([dataset[number] for number in range(rows)])
        order = sample["id"].argsort()
        assert sample["id"][order].tolist() == list(range(rows))
        return {**sample, "id": torch.arange(rows)}  # fairseq's diverse beam indexes its table by them

    def ours(self, *flags, models=None, lm=None, batch=None, constraints_kind=None, **inputs):
        """Hypotheses of the generator that the task builds under `flags`.

        constraints_kind: what fairseq-interactive is given as --constraints, which fairseq-generate refuses.
        """
        args = self.parse(*flags).generation
        args.constraints = constraints_kind
        models = models or [self.model]
        generator = self.task.build_generator(models, args, extra_gen_cls_kwargs={"lm_model": lm, "lm_weight": 0.3})
        assert isinstance(generator, MoESequenceGenerator | MoESequenceGeneratorWithAlignment)
        torch.manual_seed(7)
        return self.task.inference_step(generator, models, batch or self.batch(), **inputs)

    def fairseqs(self, models=None, lm=None, cls=SequenceGenerator, strategy=None, batch=None, inputs=None, **options):
        """Hypotheses of fairseq's generator with a search strategy that the test names."""
        models = models or [self.model]
        options = {"beam_size": 4, "lm_model": lm, "lm_weight": 0.3, **options}
        strip = {"symbols_to_strip_from_output": self.strip}
        generator = cls(models, self.dictionary, search_strategy=strategy, **strip, **options)
        if generator.repeat_ngram_blocker is not None:
            generator.repeat_ngram_blocker = BlockingRepeats(generator.repeat_ngram_blocker)
        torch.manual_seed(7)
        return self.task.inference_step(generator, models, batch or self.batch(), **(inputs or {}))


class BlockingRepeats(torch.nn.Module):
    """fairseq's blocker of repeated n-grams, given the tokens so far: at the end of the whole buffer it finds none."""

    def __init__(self, block: torch.nn.Module):
        super().__init__()
        self.block = block

    def forward(self, tokens, scores, rows, beam_size, step):
        return self.block(tokens[:, : step + 1], scores, rows, beam_size, step)


@pytest.fixture(scope="module", params=MODELS)
def served(request, shared_goldens) -> Served:
    return Served(shared_goldens, request.param)


@pytest.fixture(scope="module")
def plain(shared_goldens) -> Served:
    return Served(shared_goldens, "mt_plain")


def assert_same(ours: list, theirs: list) -> None:
    """Every sentence has the same hypotheses in the same order up to ties, with the same scores."""
    assert len(ours) == len(theirs) > 0 and all(map(len, theirs))
    # beams that share keys add up in another order; scores are sums over the tokens, and differences of sums
    for some, wanted in paired(of_tokens(ours), of_tokens(theirs), tie=1e-6, rtol=1e-6):
        assert len(some.words) > 1
        rounding = 3e-7 * np.abs(np.cumsum(wanted.positions)).max()
        np.testing.assert_allclose(some.positions, wanted.positions, rtol=0, atol=1e-5 + rounding)


def texts(hypotheses: list) -> list[list[list[int]]]:
    return [[hypothesis["tokens"].tolist() for hypothesis in sentence] for sentence in hypotheses]


PLAIN_OPTIONS = {
    "beam 1": (("--beam", "1"), {"beam_size": 1}),
    "beam 7": (("--beam", "7", "--nbest", "7"), {"beam_size": 7}),
    "lenpen": (("--lenpen", "2.5"), {"len_penalty": 2.5}),
    "unnormalized": (("--unnormalized",), {"normalize_scores": False}),
    "unkpen": (("--unkpen", "-30"), {"unk_penalty": -30.0}),
    "min-len": (("--min-len", "25"), {"min_len": 25}),
    "max-len": (("--max-len-a", "0.3", "--max-len-b", "2"), {"max_len_a": 0.3, "max_len_b": 2}),
    "temperature": (("--temperature", "2.5"), {"temperature": 2.5}),
    "no repeats": (("--no-repeat-ngram-size", "2", "--min-len", "25"), {"no_repeat_ngram_size": 2, "min_len": 25}),
}


def test_beam_search(served):
    assert_same(served.ours(), served.fairseqs())


@pytest.mark.parametrize("option", PLAIN_OPTIONS)
def test_an_option_of_the_beam(plain, option):
    flags, options = PLAIN_OPTIONS[option]
    found = plain.ours(*flags)
    assert_same(found, plain.fairseqs(**options))
    assert texts(found) != plain.beams  # the option does something here


@pytest.mark.parametrize("size", [1, 2])
def test_no_ngram_is_repeated(served, size):
    repeating = served.ours("--min-len", "25")
    found = served.ours("--min-len", "25", "--no-repeat-ngram-size", str(size))
    assert any(repeated(tokens, size) for tokens in best(repeating))  # else the option has nothing to do
    assert not any(repeated(tokens, size) for tokens in best(found))


@pytest.mark.parametrize("size", [1, 2])
def test_a_prefix_may_repeat_what_a_hypothesis_may_not(size):
    """Or else its sentence could never end: fairseq's search dies of it."""
    block = RepeatBlock(NGramRepeatBlock(size))
    tokens = torch.tensor([[2, 5, 4, 5], [2, 5, 4, 5], [2, 5, 4, 5]])
    lprobs = torch.full((3, 8), -math.inf)
    lprobs[0, 4] = -3.0  # a prefix's next word
    lprobs[1, [4, 6]] = torch.tensor([-1.0, -2.0])
    lprobs[2, 2] = -4.0  # the end at the greatest length
    found = block(tokens, lprobs.clone(), 3, 1, 3)
    assert torch.equal(found[[0, 2]], lprobs[[0, 2]])
    assert found[1, 4] == -math.inf and found[1, 6] == -2


def test_prompts_that_repeat_ngrams_end(tmp_path):
    data = write_data(tmp_path / "data", splits={"train": 8, "valid": 6, "test": 24})
    untrained_checkpoint(tmp_path / "X.pt", data, *LM_TRAINING)
    given = ("--task", "moe_language_modeling", "--tokens-per-sample", "16", "--sample-break-mode", "eos", "--cpu")
    more = ("--max-len-b", "15", "--no-repeat-ngram-size", "2", "--num-workers", "0", "--path", tmp_path / "X.pt")
    found = commands.generate(data, *given, *more)
    assert len(found.hypotheses()) == 24
    assert any(repeated(text.split(), 2) for _, text in found.hypotheses())  # a prompt's own


def best(hypotheses: list) -> list[list[int]]:
    """The tokens of every sentence's first hypothesis, without the end."""
    return [sentence[0]["tokens"].tolist()[:-1] for sentence in hypotheses]


def repeated(tokens: list[int], size: int) -> bool:
    ngrams = [tuple(tokens[start : start + size]) for start in range(len(tokens) - size + 1)]
    return len(set(ngrams)) < len(ngrams)


STRATEGIES = {
    "sampling": (("--sampling",), lambda words: search.Sampling(words)),
    "sampling topk": (("--sampling", "--sampling-topk", "5"), lambda words: search.Sampling(words, 5)),
    "sampling topp": (("--sampling", "--sampling-topp", "0.6"), lambda words: search.Sampling(words, -1, 0.6)),
    "diverse groups": (
        ("--diverse-beam-groups", "2", "--diverse-beam-strength", "0.9"),
        lambda words: search.DiverseBeamSearch(words, 2, 0.9),
    ),
    "diverse siblings": (("--diversity-rate", "0.7"), lambda words: search.DiverseSiblingsSearch(words, 0.7)),
}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_search_strategy(plain, strategy):
    flags, make = STRATEGIES[strategy]
    found = plain.ours(*flags)
    assert_same(found, plain.fairseqs(strategy=make(plain.dictionary)))
    assert texts(found) != plain.beams


def test_match_source_len(plain):
    strategy = search.LengthConstrainedBeamSearch(plain.dictionary, 1, 0, 1, 0)
    found = plain.ours("--match-source-len")
    assert_same(found, plain.fairseqs(strategy=strategy, match_source_len=True))
    lengths = plain.batch()["net_input"]["src_lengths"].tolist()
    assert [len(sentence[0]["tokens"]) - 1 for sentence in found] == lengths


def test_prefix_tokens(served):
    prefix = served.batch()["target"][:, :5]
    found = served.ours(prefix_tokens=prefix)
    assert_same(found, served.fairseqs(inputs={"prefix_tokens": prefix}))
    for sentence, wanted in zip(found, prefix.tolist(), strict=True):
        assert all(hypothesis["tokens"].tolist()[:5] == wanted for hypothesis in sentence)


@pytest.mark.parametrize("kind", ["ordered", "unordered"])
def test_constraints(plain, kind):
    batch = plain.batch(2)
    words = batch["target"][:, 3:6]  # the reference's
    constraints = pack_constraints([[row[:2], row[2:]] for row in words])
    strategy = search.LexicallyConstrainedBeamSearch(plain.dictionary, kind)
    found = plain.ours(constraints_kind=kind, constraints=constraints, batch=batch)
    assert_same(found, plain.fairseqs(strategy=strategy, batch=batch, inputs={"constraints": constraints}))
    for sentence, wanted in zip(found, words.tolist(), strict=True):
        assert set(wanted) <= set(sentence[0]["tokens"].tolist())


def language_model(plain: Served, experts: int):
    """An untrained language model over the target dictionary; 0 experts: fairseq's own dense one."""
    args = Namespace(decoder_layers=2, decoder_embed_dim=32, decoder_ffn_embed_dim=48, max_target_positions=256)
    args.moe_freq, args.moe_expert_count, args.share_decoder_input_output_embed = 2 * bool(experts), experts, True
    vocabulary = Namespace(source_dictionary=plain.dictionary, target_dictionary=plain.dictionary)
    torch.manual_seed(3)
    if experts:
        moe_transformer_lm_tiny(args)
        model = MoETransformerLanguageModel.build_model(args, vocabulary)
        assert len(model.moe_layers()) == 1
    else:
        base_lm_architecture(args)
        model = TransformerLanguageModel.build_model(args, vocabulary)
    for parameter in model.parameters():
        parameter.data.mul_(2)  # far from uniform
    model.eval()
    model.prepare_for_inference_(plain.cfg)
    return model


@pytest.mark.parametrize("experts", [0, 4])
def test_fusion_with_a_language_model(plain, experts):
    model = language_model(plain, experts)
    found = plain.ours(lm=model)
    assert_same(found, plain.fairseqs(lm=model))
    assert texts(found) != plain.beams


def test_an_ensemble_of_one_model_twice_is_that_model(plain):
    merged = plain.load("checkpoint_merged.pt")
    assert_same(plain.ours(models=[plain.model, merged]), plain.ours())


def test_an_ensemble_of_two_models(plain):
    other = deepcopy(plain.model)
    generator = torch.Generator().manual_seed(0)
    for parameter in other.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator) * parameter.std() * 0.3)
    models = [plain.model, other]
    found = plain.ours(models=models)
    assert_same(found, plain.fairseqs(models=models))
    assert texts(found) != plain.beams
    assert texts(found) != texts(plain.ours(models=[other]))


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_alignments(plain, kind):
    found = plain.ours("--print-alignment", kind)
    options = {"cls": SequenceGeneratorWithAlignment, "print_alignment": kind}
    wanted = plain.fairseqs(**options)
    assert_same(found, wanted)
    for sentence, other in zip(found, wanted, strict=True):
        some, others = (np.array(hypotheses[0]["alignment"], float) for hypotheses in (sentence, other))
        np.testing.assert_allclose(some, others, rtol=0, atol=1e-5)
        assert some.size > 0


@pytest.mark.parametrize(
    ("name", "recording", "mean"),
    [
        ("mt_plain", "tf_en-de_cap1.0_b36_padmask", -2.7290883),
        ("mt_nllb_ws2", "tf_en-de_cap1.0_b36_nopadmask", -2.5429764),
    ],
)
def test_score_reference(shared_goldens, name, recording, mean):
    """The whole command: batches, targets and scores as upstream recorded them."""
    folder = shared_goldens / name
    flags = commands.MT if name == "mt_plain" else (*commands.NLLB, "-t", "de")
    path = ("--path", folder / "checkpoint_last.pt", "--batch-size", "36", "--score-reference")
    generation = commands.generate(folder / "data-bin", *path, *flags)
    with np.load(folder / "golden" / f"{recording}.npz") as arrays:
        wanted = {
            int(number): row[target != 1]
            for i in range(int(arrays["n_batches"]))
            for number, row, target in zip(
                arrays[f"b{i}/id"], arrays[f"b{i}/scores"], arrays[f"b{i}/target"], strict=True
            )
        }
    found = {number: row for batch in generation.batches for number, row in zip(batch.ids, batch.scores, strict=True)}
    assert found.keys() == wanted.keys() == set(range(100))
    for number, row in wanted.items():
        np.testing.assert_allclose(found[number], row, rtol=0, atol=1e-4)
    assert np.concatenate(list(found.values())).mean(dtype=np.float64) == pytest.approx(mean, abs=1e-5)
    printed = {number: fields[0].split() for number, fields in generation.of_kind("P")}
    for number, row in wanted.items():
        np.testing.assert_allclose(np.array(printed[number], float), row / np.log(2), rtol=0, atol=2e-4)
