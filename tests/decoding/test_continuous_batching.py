"""--continuous-batching against fairseq's own generator, batch by batch; and against the same command without it."""

import gc
import io
import json
import logging
import math
import weakref
from argparse import Namespace

import commands
import pytest
import torch
from fairseq import search
from fairseq.sequence_generator import SequenceGenerator
from fairseq_cli import generate as generate_command
from flag_makers import parsed
from model_makers import WORDS, dense_twin, dictionary, translation_input, translation_model
from ties import assert_same_generation, assert_same_hypotheses, of_lines, of_tokens

from fairseq_moe_ext.decoding.generator import MoEContinuousGenerator, MoESequenceGenerator, ServedBatches
from fairseq_moe_ext.decoding.requests import Request, Room, check_options
from fairseq_moe_ext.reporting.observer import Observer
from fairseq_moe_ext.tasks.flags import check_flags

EOS = 2


def batches(sizes=(3, 1, 4, 2, 5), prefix: int = 0, left_pad: bool = True, seed: int = 3) -> list[Request]:
    """Batches as fairseq makes them: sources from short to long, padded to the longest of their batch."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 14, (sum(sizes),), generator=generator).sort().values.tolist()
    found = []
    for size in sizes:
        rows = [torch.randint(4, WORDS, (lengths.pop(0),), generator=generator) for _ in range(size)]
        for row in rows:
            row[-1] = EOS
        width = max(map(len, rows))
        source = torch.ones(size, width, dtype=torch.int64)
        for line, row in zip(source, rows, strict=True):
            line[width - len(row) :] = row
            if not left_pad:
                line.copy_(line.roll(len(row) - width))
        prefixes = None
        if prefix:
            prefixes = torch.randint(4, WORDS, (size, prefix), generator=generator)
            prefixes[0, -1] = 1  # shorter than the batch's others
        sample = {"net_input": {"src_tokens": source, "src_lengths": source.ne(1).sum(dim=1)}}
        found.append(Request(sample, prefixes))
    return found


def in_turn(generator, requests: list[Request]) -> list[list[dict]]:
    """Every sentence's hypotheses, as fairseq-generate asks for them."""
    served, hypotheses = ServedBatches([request.sample for request in requests], Observer("dynamic")), []
    request_of = {id(request.sample): request for request in requests}
    generator.look_ahead = lambda: request_of.get(id(served.look_ahead()))
    for sample in served:
        prefix = request_of[id(sample)].prefix_tokens
        hypotheses += generator.generate(generator.model.models, sample, prefix_tokens=prefix)
    return hypotheses


def continuous(model, requests: list[Request], room: Room = Room(4), **options):
    """Hypotheses, and the sentences in the decoder at every step, of the stream of `requests`."""
    generator = MoEContinuousGenerator([model], dictionary(), **options)
    generator.room = room
    live, steps, step = [], generator._steps, generator._steps.step
    steps.step = lambda: (live.append([sentence.source_length for sentence in steps.live]), step())
    return in_turn(generator, requests), live


def assert_same(found: list[list[dict]], expected: list[list[dict]]) -> None:
    assert_same_hypotheses(of_tokens(found), of_tokens(expected), rtol=1e-5)


def model(**fields):
    """With random weights, and outputs of many lengths: the end is as likely as an output projection can make it."""
    served, generator = translation_model(**fields).eval(), torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in served.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        mean = served(**translation_input(), features_only=True)[0].mean((0, 1))
        weight = torch.randn(served.decoder.output_projection.weight.shape, generator=generator) * 0.15
        weight[EOS] += 1.5 * mean / mean.square().sum()
    served.decoder.output_projection.weight = torch.nn.Parameter(weight)  # no longer the embedding's
    return served


OPTIONS = {
    "greedy": {"beam_size": 1},
    "beam 4": {"beam_size": 4},
    "beam 5, short is good": {"beam_size": 5, "len_penalty": 0.3},
    "long is good": {"beam_size": 4, "len_penalty": 2.0},
    "sums of scores": {"beam_size": 4, "normalize_scores": False},
    "few unknown words": {"beam_size": 4, "unk_penalty": 3.0},
    "many unknown words, flat": {"beam_size": 5, "unk_penalty": -2.0, "temperature": 2.5},
    "no short outputs": {"beam_size": 4, "min_len": 5},
    "output as long as its batch's source": {"beam_size": 4, "max_len_a": 0.7, "max_len_b": 2},
}


LEARNED = {"decoder_learned_pos": True, "encoder_normalize_before": True}


@pytest.mark.parametrize("fields, options", [
    *(pytest.param({}, options, id=name) for name, options in OPTIONS.items()),
    *(pytest.param(LEARNED, OPTIONS[name], id=f"learned positions, {name}") for name in ("greedy", "beam 4")),
])
def test_hypotheses_are_fairseqs(fields, options):
    served, options = model(**fields), {"max_len_b": 12, **options}
    expected = in_turn(SequenceGenerator([served], dictionary(), **options), batches())
    found, live = continuous(served, batches(), **options)
    assert_same(found, expected)
    lengths = {len(hypothesis["tokens"]) for sentence in found for hypothesis in sentence}
    assert len(lengths) > 1
    assert max(map(len, live)) == 4


@pytest.mark.parametrize("prefix, ends", [(1, False), (3, False), (3, True)])
def test_forced_beginnings(prefix, ends):
    requests = batches(prefix=prefix)
    if ends:
        requests[2].prefix_tokens[1, 1:] = torch.tensor([EOS, 1])
        requests[4].prefix_tokens[2, 2] = EOS
    served, options = model(), {"beam_size": 4, "max_len_b": 10, "min_len": 2}
    expected = in_turn(SequenceGenerator([served], dictionary(), **options), requests)
    assert_same(continuous(served, requests, **options)[0], expected)


def test_sources_padded_at_their_end_and_a_dense_model():
    options = {"beam_size": 3, "max_len_b": 12}
    for served in (model(), dense_twin(model())):
        expected = in_turn(SequenceGenerator([served], dictionary(), **options), batches(left_pad=False))
        assert_same(continuous(served, batches(left_pad=False), **options)[0], expected)


def test_the_room_is_filled_as_long_as_sentences_wait():
    served, options = model(), {"beam_size": 2, "max_len_b": 12}
    _, live = continuous(served, batches(), Room(6), **options)
    sizes = [len(step) for step in live]
    assert sizes[0] == 6 and sizes == sorted(sizes, reverse=True)  # of the first three batches; fewer when none wait
    _, live = continuous(served, batches(), Room(None, 24), **options)
    assert all(len(step) * max(step) <= 24 for step in live)
    assert max(map(len, live)) > 2
    alone, live = continuous(served, batches(), Room(1), **options)
    assert {len(step) for step in live} == {1}
    assert_same(alone, in_turn(MoESequenceGenerator([served], dictionary(), **options), batches()))


@pytest.mark.parametrize("beam", [1, 4])
def test_finished_sentences_leave_fairseqs_batch_at_once(beam):
    """And beams that share their sentence's encoder output find what beams with copies find."""
    served, options, rows = model(), {"beam_size": beam, "max_len_b": 12}, []
    decode = served.decoder.forward
    served.decoder.forward = lambda tokens, **state: (rows.append(tokens.size(0)), decode(tokens, **state))[1]
    (request,) = batches((12,))
    expected = in_turn(SequenceGenerator([served], dictionary(), **options), [request])
    copied, rows[:] = rows[:], []
    found = in_turn(MoESequenceGenerator([served], dictionary(), **options), [request])
    assert_same(found, expected)
    assert rows == copied
    # a sentence is done when its last hypothesis is, after as many steps as that has tokens
    steps = [max(len(each["tokens"]) for each in sentence) for sentence in found]
    assert rows == [beam * sum(each > step for each in steps) for step in range(max(steps))]
    assert len(set(rows)) > 2


def test_options_that_continuous_batching_refuses():
    served = model()
    check_options(Namespace(sampling=False, diverse_beam_groups=-1, constraints=None), [served])
    for name, value in (("sampling", True), ("diverse_beam_groups", 2), ("no_repeat_ngram_size", 3)):
        with pytest.raises(ValueError, match=f"--continuous-batching goes without --{name.replace('_', '-')}, got"):
            check_options(Namespace(**{name: value}), [served])
    with pytest.raises(ValueError, match="moe_second_expert_policy must be all .* got sampling in encoder.layers.1"):
        check_options(Namespace(), [model(moe_second_expert_policy="sampling")])
    with pytest.raises(ValueError, match="one model, got an ensemble of 2"):
        check_options(Namespace(), [served, served])
    with pytest.raises(ValueError, match="got Linear"):
        check_options(Namespace(), [torch.nn.Linear(1, 1)])
    with pytest.raises(ValueError, match="--beam must be below half of the 37 words, got 20"):
        MoEContinuousGenerator([served], dictionary(), beam_size=20)


@pytest.mark.parametrize(("flags", "words"), [
    (("--moe-gating", "static"), "--moe-eval-capacity-token-fraction 1.0, got the checkpoint's"),
    (("--moe-gating", "static", "--moe-eval-capacity-token-fraction", "0.5"), "fraction 1.0, got 0.5"),
    (("--moe-capacity-factor", "2"), "--moe-capacity-factor 2.0 must have --moe-capacity-phases prefill, got all"),
])
def test_results_that_depend_on_the_batch(flags, words):
    with pytest.raises(ValueError, match=words):
        check_flags(parsed("moe_translation", "--continuous-batching", *flags))
    check_flags(parsed("moe_translation", *flags))


def test_flags_that_go_with_it():
    prefill = ("--moe-capacity-factor", "2", "--moe-capacity-phases", "prefill")
    whole = ("--moe-gating", "static", "--moe-eval-capacity-token-fraction", "1.0")
    for flags in ((), prefill, whole):
        check_flags(parsed("moe_translation", "--continuous-batching", *flags))


def test_continuous_batching_is_refused_by_the_language_model_task(shared_goldens):
    golden = shared_goldens / "lm_top2"
    with pytest.raises(ValueError, match="--continuous-batching is for translation tasks, got moe_language_modeling"):
        path = ("--path", golden / "checkpoint_last.pt")
        commands.eval_lm(golden / "data-bin", *path, *commands.LM, "--continuous-batching")


def generated(goldens, name, report, *flags):
    folder = goldens / name
    arguments = (folder / "data-bin", "--path", folder / "checkpoint_last.pt", "--moe-report", report, *flags)
    arguments += (*commands.NLLB, "-t", "de") if name == "mt_nllb_ws2" else commands.MT
    return commands.generate(*arguments), json.loads(report.read_text())


@pytest.mark.parametrize(("name", "flags"), [
    pytest.param("mt_plain", ("--batch-size", "12", "--nbest", "3"), marks=pytest.mark.slow),
    ("mt_nllb_ws2", ("--max-tokens", "200", "--num-shards", "2")),
    pytest.param("mt_plain", ("--batch-size", "12", "--prefix-size", "2", "--beam", "1"), marks=pytest.mark.slow),
])
def test_the_same_lines_in_fewer_steps(shared_goldens, tmp_path, name, flags):
    expected, without = generated(shared_goldens, name, tmp_path / "report.json", *flags)
    found, with_it = generated(shared_goldens, name, tmp_path / "report.json", *flags, "--continuous-batching")
    assert_same_generation(found, expected)
    assert with_it["encoder"]["tokens"] == without["encoder"]["tokens"]
    assert with_it["decoder"]["tokens"] == without["decoder"]["tokens"]
    assert with_it["generation"] == without["generation"]
    assert with_it["decoder"]["steps"] < 0.85 * without["decoder"]["steps"]


@pytest.mark.slow
def test_generate_with_continuous_batching_prints_upstreams_translations(shared_goldens):
    folder = shared_goldens / "mt_plain"
    flags = (folder / "data-bin", "--path", folder / "checkpoint_last.pt", *commands.MT, "--batch-size", "8")
    done = commands.run("generate", *flags, "--continuous-batching")
    expected = commands.read_generation(folder / "golden" / "gen_en-de_cap1.0_b36.txt")
    found = commands.Generation(done.stdout.splitlines())
    ours, fairseqs = (sorted(of_lines(generation).items()) for generation in (found, expected))
    assert [number for number, _ in ours] == [number for number, _ in fairseqs]
    assert_same_hypotheses([each for _, each in ours], [each for _, each in fairseqs], positions=2e-4)
    done = commands.run("interactive", *flags[:-4], "--continuous-batching", "--task", "moe_translation", check=False)
    assert done.returncode != 0 and "--continuous-batching is for fairseq-generate" in done.stderr


@pytest.mark.parametrize("ids", [True, False], ids=["numbered", "without numbers"])
def test_each_batch_gets_its_own_hypotheses_in_any_order_of_calls(ids):
    """Batches that were looked at are asked for in another order, and one is never asked for."""
    requests, served, options = batches(), model(), {"beam_size": 3, "max_len_b": 8}
    for number, request in enumerate(requests if ids else ()):
        request.sample["id"] = torch.arange(request.sample["net_input"]["src_tokens"].size(0)) + 100 * number
    expected = [in_turn(SequenceGenerator([served], dictionary(), **options), [each]) for each in requests]
    generator = MoEContinuousGenerator([served], dictionary(), **options)
    generator.room, ahead = Room(9), iter(requests)
    generator.look_ahead = lambda: next(ahead, None)
    for number in (0, 3, 2, 0):
        assert_same(generator.generate([served], requests[number].sample), expected[number])


def test_a_sentence_of_nans_leaves_nothing_in_its_slot():
    """Its cached keys and values have no weight for whoever comes after it, which does not keep a NaN out."""
    served, options = model(), {"beam_size": 3, "max_len_b": 8}
    expected = in_turn(MoESequenceGenerator([served], dictionary(), **options), batches())
    requests = batches()
    word = int(requests[0].sample["net_input"]["src_tokens"][0, -2])
    broken = [word in row for request in requests for row in request.sample["net_input"]["src_tokens"].tolist()]
    assert broken[0] and not all(broken)
    with torch.no_grad():
        served.encoder.embed_tokens.weight[word] = math.nan
    generator = MoEContinuousGenerator([served], dictionary(), **options)
    generator.room, ahead = Room(2), iter(requests[1:])
    generator.look_ahead = lambda: next(ahead, None)
    found = [each for request in requests for each in generator.generate([served], request.sample)]
    assert [not math.isfinite(sentence[0]["score"]) for sentence in found] == broken
    whole = [number for number, wrong in enumerate(broken) if not wrong]
    assert_same([found[number] for number in whole], [expected[number] for number in whole])


def test_a_generator_leaves_nothing_with_the_model():
    served = model()
    embed = served.decoder.embed_positions
    generator = MoEContinuousGenerator([served], dictionary(), beam_size=2, max_len_b=6)
    in_turn(generator, batches())
    assert not embed._forward_hooks and not generator._steps._rows.state and generator._steps._tokens is None
    rows, found = weakref.ref(generator._steps._rows), weakref.ref(generator)
    del generator
    gc.collect()
    assert rows() is None and found() is None


def test_a_search_that_this_one_is_not_is_refused():
    strategy = search.PrefixConstrainedBeamSearch(dictionary(), lambda batch, tokens: [4])
    with pytest.raises(ValueError, match="--continuous-batching .*BeamSearch .*PrefixConstrained"):
        MoEContinuousGenerator([model()], dictionary(), search_strategy=strategy)
    assert MoEContinuousGenerator([model()], dictionary(), search_strategy=search.BeamSearch(dictionary()))


def test_references_are_scored_without_it(shared_goldens, caplog):
    """The command line refuses the two flags together; a program may put both into one configuration."""
    folder = shared_goldens / "mt_plain"
    arguments = (folder / "data-bin", "--path", folder / "checkpoint_last.pt", "--batch-size", "36", *commands.MT)
    wanted = commands.generate(*arguments, "--score-reference")
    cfg, output = commands.parse("generate", *arguments, "--continuous-batching"), io.StringIO()
    cfg.generation.score_reference = True
    with caplog.at_level(logging.WARNING, "fairseq_moe_ext"):
        generate_command._main(cfg, output)
    assert output.getvalue().splitlines() == wanted.lines and len(wanted.of_kind("H")) == 100
    assert caplog.text.count("--continuous-batching has no effect under --score-reference") == 1
