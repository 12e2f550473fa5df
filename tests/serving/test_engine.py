"""The engine of requests against fairseq's search of each sentence alone, and its promises where requests go wrong."""

import gc
import threading
import weakref
from argparse import Namespace
from concurrent.futures import CancelledError, ThreadPoolExecutor, wait

import pytest
import torch
from data_makers import untrained_checkpoint, write_data
from fairseq.data import data_utils
from fairseq.sequence_generator import SequenceGenerator
from fairseq.tasks import FairseqTask
from ties import assert_same_hypotheses, of_tokens

import fairseq_moe_ext as moe
from fairseq_moe_ext.checkpoints.errors import ClosedError
from fairseq_moe_ext.reporting.finite import NotFiniteError
from fairseq_moe_ext.serving.engine import FullError

COUNT = 8
BEAM = {"beam": 4, "max_len_b": 14}
PIECES = {"post_process": "sentencepiece", "cpu": True}
NLLB = {"source_lang": "en", "encoder_langtok": "src", "decoder_langtok": True, "langs": "en,de,fr"}


class Loaded:
    """A golden's model in service, and the first sentences of its test data; searches like BEAM."""

    def __init__(self, folder, **options):
        data = folder / "data-bin"
        self.served = moe.load(folder / "checkpoint_last.pt", data=data, **PIECES, **options)
        parts = self.served._parts
        self.task, (self.model,) = parts.task, parts.models
        self._generation = parts.generator(BEAM)[1].generation
        read = data_utils.load_indexed_dataset(str(data / "test.en-de.en"), self.task.source_dictionary)
        self.sentences = [read[number].long() for number in range(COUNT)]
        self.texts = [self.task.source_dictionary.string(tokens) for tokens in self.sentences]

    def engine(self, **options):
        return self.served.engine(**BEAM, **options)

    @property
    def steps(self) -> int:
        """Decoder passes so far."""
        return self.served.report()["decoder"]["steps"]

    def alone(self, tokens: torch.Tensor, **options) -> list[dict]:
        """What fairseq's own generator finds for one sentence."""
        generation = Namespace(**{**self._generation, **options})
        generator = FairseqTask.build_generator(self.task, [self.model], generation, seq_gen_cls=SequenceGenerator)
        dataset = self.task.build_dataset_for_inference([tokens], [tokens.numel()])
        sample = dataset.collater([dataset[0]])
        sample = {"net_input": {name: sample["net_input"][name] for name in ("src_tokens", "src_lengths")}}
        (found,) = self.task.inference_step(generator, [self.model], sample)
        return found[: generation.nbest]


@pytest.fixture(scope="module")
def bilingual(shared_goldens):
    return Loaded(shared_goldens / "mt_plain")


@pytest.fixture(scope="module")
def multilingual(shared_goldens):
    return Loaded(shared_goldens / "mt_nllb_ws2", target_lang="de", **NLLB)


@pytest.fixture(scope="module")
def best(bilingual):
    """What fairseq finds best for every sentence, beam 4."""
    return [bilingual.alone(tokens) for tokens in bilingual.sentences]


def assert_same(requests, expected) -> None:
    found = of_tokens([request.result(timeout=0) for request in requests])
    assert_same_hypotheses(found, of_tokens(expected), rtol=1e-5)


OPTIONS = (
    {},
    {"beam": 1},
    {"nbest": 3, "lenpen": 0.2},
    {"min_len": 9, "max_len_b": 11},
    {"max_len_a": 0.3, "max_len_b": 1},
    {"unkpen": -3.0, "unnormalized": True, "nbest": 4},
    {"beam": 5, "nbest": 5, "temperature": 1.7},
    {"temperature": 0.6, "max_len_b": 4},
)


def test_each_request_has_its_own_options(bilingual):
    engine = bilingual.engine()
    requests = [
        engine.submit(tokens, **options) for tokens, options in zip(bilingual.sentences, OPTIONS, strict=True)
    ]
    engine.run()
    expected = [
        bilingual.alone(tokens, **options) for tokens, options in zip(bilingual.sentences, OPTIONS, strict=True)
    ]
    assert_same(requests, expected)
    assert len({len(request.result()) for request in requests}) > 2
    plain = of_tokens([bilingual.alone(tokens) for tokens in bilingual.sentences])
    for options, theirs, ours in list(zip(OPTIONS, plain, of_tokens(expected), strict=True))[1:]:
        assert ours != theirs, f"{options} change nothing: the test sees nothing"


def test_eight_together_take_the_steps_of_the_longest(bilingual, best):
    engine, before = bilingual.engine(), bilingual.steps
    alone = []
    for tokens in bilingual.sentences:
        engine.submit(tokens)
        start = bilingual.steps
        engine.run()
        alone.append(bilingual.steps - start)
    assert bilingual.steps - before == sum(alone)
    start = bilingual.steps
    requests = [engine.submit(tokens) for tokens in bilingual.sentences]
    engine.run()
    assert bilingual.steps - start == max(alone) < sum(alone) / 4
    assert_same(requests, best)


def test_requests_come_while_others_are_under_way_and_no_more_than_there_is_room(bilingual, best):
    engine, requests = bilingual.engine(batch_size=3), []
    for number, tokens in enumerate(bilingual.sentences):
        requests.append(engine.submit(tokens))
        for _ in range(number % 3):
            engine.step()
            assert len(engine._decoder.requests) <= 3
    together = []
    while engine.step():
        together.append(len(engine._decoder.requests))
    assert max(together) == 3
    assert_same(requests, best)
    lengths = sorted(map(len, bilingual.sentences))
    tight = bilingual.engine(max_tokens=2 * lengths[-1])
    requests = [tight.submit(tokens) for tokens in bilingual.sentences]
    tight.step()
    assert 2 <= len(tight._decoder.requests) < COUNT
    tight.run()
    assert_same(requests, best)


@pytest.mark.parametrize("after", [0, 1, 5])
def test_a_cancelled_request_leaves_the_others_right(bilingual, best, after):
    engine = bilingual.engine(batch_size=6)
    requests = [engine.submit(tokens) for tokens in bilingual.sentences]
    for _ in range(after):
        engine.step()
    gone = [requests[1], requests[7]]  # under way after the first step, and waiting
    assert all(engine.cancel(request) for request in gone)
    engine.step()
    assert not {*gone} & {*engine._decoder.requests}
    engine.run()
    for request in gone:
        with pytest.raises(CancelledError):
            request.result(timeout=0)
    kept = [number for number, request in enumerate(requests) if request not in gone]
    assert_same([requests[number] for number in kept], [best[number] for number in kept])
    assert not engine.cancel(requests[0])
    assert wait(requests, timeout=0).not_done == set()


def test_a_sentence_whose_scores_are_no_numbers_fails_alone(bilingual, best):
    """Whoever takes its place in the decoder finds nothing of it there."""
    others = {int(word) for tokens in bilingual.sentences[1:] for word in tokens}
    word = next(int(word) for word in bilingual.sentences[0] if int(word) not in others)
    weight = bilingual.model.encoder.embed_tokens.weight
    was = weight[word].clone()
    engine = bilingual.engine(batch_size=3)
    requests = [engine.submit(tokens) for tokens in bilingual.sentences]
    with torch.no_grad():
        weight[word] = float("nan")
    try:
        engine.run()
    finally:
        with torch.no_grad():
            weight[word] = was
    with pytest.raises(NotFiniteError, match=r"no number: .*float32 are not finite, first in encoder\.layers\.0"):
        requests[0].result(timeout=0)
    assert_same(requests[1:], best[1:])


class Failing:
    """A part of the model whose `forward` raises where `wrong` holds of its arguments."""

    def __init__(self, module, wrong, error=RuntimeError):
        self._module, self._wrong, self._error, self._forward = module, wrong, error, module.forward
        self.failures = 0

    def __enter__(self):
        def forward(*arguments, **more):
            if self._wrong(*arguments, **more):
                self.failures += 1
                raise self._error("the pass broke")
            return self._forward(*arguments, **more)

        self._module.forward = forward
        return self

    def __exit__(self, *_):
        del self._module.forward


def test_a_pass_that_fails_for_one_sentence_fails_for_none_of_the_others(bilingual, best):
    engine = bilingual.engine()
    requests = [engine.submit(tokens) for tokens in bilingual.sentences]
    wrong = bilingual.sentences[3][0]
    with Failing(bilingual.model.encoder, lambda src_tokens, **_: bool((src_tokens == wrong).any())) as encoder:
        engine.step()
    assert encoder.failures >= 2  # together, and alone
    engine.run()
    broken = [number for number, tokens in enumerate(bilingual.sentences) if bool((tokens == wrong).any())]
    for number in broken:
        with pytest.raises(RuntimeError, match="the pass broke"):
            requests[number].result(timeout=0)
    kept = [number for number in range(COUNT) if number not in broken]
    assert 3 in broken and len(kept) >= 2
    assert_same([requests[number] for number in kept], [best[number] for number in kept])


def test_a_decoder_step_that_fails_for_one_sentence_fails_for_none_of_the_others(bilingual, best):
    engine = bilingual.engine()
    requests = [engine.submit(tokens) for tokens in bilingual.sentences]
    engine.step()
    with Failing(bilingual.model.decoder, lambda *_, **__: requests[5] in engine._decoder.requests):
        engine.run()
    with pytest.raises(RuntimeError, match="the pass broke"):
        requests[5].result(timeout=0)
    kept = [number for number in range(COUNT) if number != 5]
    assert_same([requests[number] for number in kept], [best[number] for number in kept])


def test_an_interrupted_step_loses_no_request(bilingual, best):
    engine = bilingual.engine()
    requests = [engine.submit(tokens) for tokens in bilingual.sentences]
    engine.step()
    with Failing(bilingual.model.decoder, lambda *_, **__: True, KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        engine.step()
    assert engine.pending == COUNT
    engine.run()
    assert_same(requests, best)


REFUSED = [
    ({"beam": 0}, "beam must be a whole number from 1 to 1000000, got 0"),
    ({"beam": True}, "beam must be a whole number from 1 to 1000000, got True"),
    ({"beam": "4"}, "beam must be a whole number from 1 to 1000000, got '4'"),
    ({"beam": 9}, "beam must be at most 8 here, got 9"),
    ({"beam": 2, "nbest": 3}, "nbest must be at most the beam size, 2, got 3"),
    ({"lenpen": float("nan")}, "lenpen must be a number from -50 to 50, got nan"),
    ({"max_len_b": 10**400}, "max_len_b must be a whole number from 0 to 1000000, got 1000"),
    ({"lenpen": -(10**400)}, "lenpen must be a number from -50 to 50, got -1000"),
    ({"source": "x"}, "a request's options must be of beam, nbest, .*, got 'source'"),
    ({"temperature": 0}, "temperature must be a number above 0 and up to 1000000, got 0"),
    ({"max_len_b": 3, "min_len": 5}, "--min-len must be at most the longest output allowed, 3, got 5"),
    ({"unnormalized": 1}, "unnormalized must be true or false, got 1"),
    ({"max_len_a": -0.1}, "max_len_a must be a number from 0 to 1000000, got -0.1"),
    ({"target_lang": ["de"]}, r"target_lang must be a language's name, got \['de'\]"),
    ({"sampling": True}, "sampling is no option of a request"),
    ({"bean": 4}, "a request's options must be of beam, nbest, .*, got 'bean'"),
    ({"target_lang": "fr"}, "target_lang must be of the model's languages, de, got 'fr'"),
    ({"tokens": []}, r"a sentence must be a text or a row of token numbers, got \[\]"),
    ({"tokens": [[4, 2]]}, r"a sentence must be a text or a row of token numbers, got \[\[4, 2\]\]"),
    ({"tokens": None}, r"a sentence must be a text or a row of token numbers, got None"),
    ({"tokens": {"a": 1}}, r"a sentence must be a text or a row of token numbers, got \{'a': 1\}"),
    ({"tokens": [4.5, 2]}, r"a sentence must be a text or a row of token numbers"),
    ({"tokens": [4, -1, 2]}, r"tokens must be numbers of the dictionary's \d+ words, got \[4, -1, 2\]"),
    ({"tokens": [4, 10**9, 2]}, r"tokens must be numbers of the dictionary's \d+ words"),
    ({"tokens": [4] * 5000 + [2]}, r"a sentence must have at most \d+ tokens, .* got 5001"),
]


def test_what_cannot_be_served_is_refused_and_leaves_the_others_right(bilingual, best):
    engine = bilingual.engine(max_beam=8)
    requests = [engine.submit(tokens) for tokens in bilingual.sentences]
    engine.step()
    for options, words in REFUSED:
        options = {"tokens": bilingual.sentences[0], **options}
        with pytest.raises(ValueError, match=f"^{words}"):
            engine.submit(options.pop("tokens"), **options)
    assert engine.pending == COUNT
    engine.run()
    assert_same(requests, best)


def test_no_more_requests_wait_than_may_and_a_closed_engine_takes_none(bilingual, best):
    engine = bilingual.engine(batch_size=2, max_waiting=3)
    requests = [engine.submit(tokens) for tokens in bilingual.sentences[:3]]
    with pytest.raises(FullError, match="at most 3 requests may wait"):
        engine.submit(bilingual.sentences[3])
    engine.cancel(requests[1])
    requests.append(engine.submit(bilingual.sentences[3]))
    engine.step()
    assert engine.wait(0) and engine.pending == 3
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(requests[3].exception)
        engine.close()
        with pytest.raises(CancelledError):
            waiting.result(timeout=30)
    assert all(request.cancelled() for request in requests) and engine.pending == 0
    engine.close()
    for call in (engine.step, lambda: engine.submit(bilingual.sentences[0])):
        with pytest.raises(ClosedError, match="an engine must be open"):
            call()
    assert not engine.wait(0)


def test_requests_of_many_threads(bilingual, best):
    engine, stop = bilingual.engine(batch_size=5), threading.Event()

    def work():
        while not stop.is_set():
            if engine.wait(0.1):
                engine.step()

    with ThreadPoolExecutor(COUNT + 1) as pool:
        worker = pool.submit(work)
        found = [pool.submit(lambda tokens=tokens: engine.submit(tokens)) for tokens in bilingual.sentences]
        requests = [each.result(timeout=60) for each in found]
        assert wait(requests, timeout=120).not_done == set()
        stop.set()
        worker.result(timeout=30)
    assert_same(requests, best)


def texts_of(found) -> list[list[tuple[str, str]]]:
    return [[(each.words, each.text) for each in sentence] for sentence in found]


def test_target_languages_share_the_steps(multilingual, shared_goldens):
    engine, few = multilingual.engine(nbest=4), range(3)
    languages = [(number, language) for number in few for language in ("de", "fr")]
    requests = [engine.submit(multilingual.sentences[number], target_lang=name) for number, name in languages]
    before = multilingual.steps
    engine.run()
    found = [each for request in requests for each in request.result()]
    assert multilingual.steps - before == max(len(each["tokens"]) for each in found)
    of_texts = [engine.submit(multilingual.texts[number], target_lang="fr") for number in few]
    engine.run()
    french = Loaded(shared_goldens / "mt_nllb_ws2", target_lang="fr", **NLLB)
    assert_same(requests[::2], [multilingual.alone(multilingual.sentences[number], nbest=4) for number in few])
    assert_same(requests[1::2], [french.alone(multilingual.sentences[number], nbest=4) for number in few])
    expected = french.served.generate([multilingual.texts[number] for number in few], **BEAM, nbest=4, batch_size=1)
    assert texts_of(request.result() for request in of_texts) == texts_of(expected)
    with pytest.raises(ValueError, match="target_lang must be of the model's languages, .*, got 'xx'"):
        engine.submit(multilingual.sentences[0], target_lang="xx")


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    {"expert_buffer_size": 2},
    {"expert_buffer_size": 2, "expert_store": "disk"},
    {"moe_gating": "static", "moe_eval_capacity_token_fraction": 1.0},
], ids=str)
def test_experts_in_a_buffer_and_static_gating(shared_goldens, best, options):
    loaded = Loaded(shared_goldens / "mt_plain", **options)
    engine = loaded.engine(batch_size=5)
    requests = [engine.submit(tokens) for tokens in loaded.sentences]
    engine.run()
    assert_same(requests, best)
    layers = loaded.served.report()["layers"]
    assert all((layer["misses"] > 0) == ("expert_buffer_size" in options) for layer in layers)
    loaded.served.close()


def test_a_language_of_another_dictionary_is_refused(multilingual, tmp_path):
    pairs = multilingual.engine()._pairs
    args, data = multilingual.task.args, multilingual.task.args.data
    for language in ("en", "de"):
        (tmp_path / f"dict.{language}.txt").write_text("a 1\n")
    args.data = str(tmp_path)
    try:
        with pytest.raises(ValueError, match=r"target_lang fr must have a dictionary, and .*dict\.fr\.txt is missing"):
            pairs.pair(target="fr")
        (tmp_path / "dict.fr.txt").write_text("b 1\n")
        with pytest.raises(ValueError, match=r"target_lang fr must have the dictionary of de, .*fr\.txt is another"):
            pairs.pair(target="fr")
    finally:
        args.data = data


def test_texts_are_translated_as_served_translates_them(bilingual):
    engine = bilingual.engine(nbest=2)
    requests = [engine.submit(f" {text} ") for text in bilingual.texts]
    engine.run()
    expected = bilingual.served.generate(bilingual.texts, **BEAM, nbest=2, batch_size=1)
    assert texts_of(request.result() for request in requests) == texts_of(expected)


@pytest.mark.parametrize(("options", "words"), [
    ({"sampling": True, "beam": 1}, "--continuous-batching goes without --sampling, got True"),
    ({"no_repeat_ngram_size": 2}, "--continuous-batching goes without --no-repeat-ngram-size, got 2"),
    ({"beem": 2}, "beem must be given to load"),
    ({"max_waiting": 0}, "max_waiting must be at least 1, got 0"),
    ({"max_beam": 0}, "max_beam must be at least 1, got 0"),
])
def test_options_that_an_engine_refuses(bilingual, options, words):
    with pytest.raises(ValueError, match=words):
        bilingual.served.engine(**options)


@pytest.mark.slow
def test_language_models_and_ensembles_have_no_engine(shared_goldens):
    lm, mt = shared_goldens / "lm_top2", shared_goldens / "mt_plain"
    paths = [mt / "checkpoint_last.pt", mt / "checkpoint_merged.pt"]
    for path, data, words in (
        (lm / "checkpoint_last.pt", lm / "data-bin", "attends to an encoder, got MoETransformerLanguageModel"),
        (paths, mt / "data-bin", "serves one model, got an ensemble of 2"),
    ):
        with moe.load(path, data=data, cpu=True) as served, pytest.raises(ValueError, match=words):
            served.engine()


@pytest.mark.slow
def test_an_engine_serves_a_dense_model_of_fairseqs_own_architecture(tmp_path):
    data = write_data(tmp_path / "data", ("en", "de"))
    training = ("--task", "translation", "--arch", "transformer_tiny", "-s", "en", "-t", "de")
    untrained_checkpoint(tmp_path / "model.pt", data, *training)
    texts, search = ["w1 w2 w3", "w4 w5"], {"beam": 3, "nbest": 2, "max_len_b": 10}
    with moe.load(tmp_path / "model.pt", data=data, cpu=True) as served, served.engine(**search) as engine:
        requests = [engine.submit(text) for text in texts]
        engine.run()
        expected = served.generate(texts, **search, batch_size=1)
        assert texts_of(request.result() for request in requests) == texts_of(expected)


@pytest.mark.parametrize(("options", "words"), [
    ({"moe_gating": "static"}, "moe_gating static must have .*_token_fraction 1.0, got the checkpoint's"),
    ({"moe_capacity_factor": 2.0}, "moe_capacity_factor must not be given, got 2.0"),
])
def test_what_would_depend_on_who_shares_a_pass_has_no_engine(shared_goldens, options, words):
    folder = shared_goldens / "mt_plain"
    with moe.load(folder / "checkpoint_merged.pt", data=folder / "data-bin", **PIECES, **options) as served:
        with pytest.raises(ValueError, match=f"an engine needs results .* shares a pass: {words}"):
            served.engine()


def test_a_model_that_closes_ends_its_engines_and_an_engine_keeps_its_model(shared_goldens):
    folder = shared_goldens / "mt_plain"
    engine = moe.load(folder / "checkpoint_merged.pt", data=folder / "data-bin", **PIECES).engine()
    gc.collect()
    request = engine.submit([5, 6, 2], max_len_b=3)
    engine.run()
    assert len(request.result()) == 1
    model, waiting = weakref.ref(engine._keep._parts.models[0]), engine.submit([5, 6, 2])
    engine.step()
    engine._keep.close()
    assert waiting.cancelled()
    with pytest.raises(ClosedError):
        engine.step()
    gc.collect()
    assert model() is None
