"""The engine of requests against fairseq's search of each sentence alone."""

import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor, wait

import pytest
from data_makers import untrained_checkpoint, write_data
from python_served import PIECES
from served_engine import BEAM, COUNT, Loaded, assert_same, texts_of
from ties import of_tokens

import fairseq_moe_ext as moe
from fairseq_moe_ext.checkpoints.errors import ClosedError

NLLB = {"source_lang": "en", "encoder_langtok": "src", "decoder_langtok": True, "langs": "en,de,fr"}


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
