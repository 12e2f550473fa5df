"""The engine where requests go wrong: one that is cancelled, refused or fails leaves the others right."""

from concurrent.futures import CancelledError, ThreadPoolExecutor, wait

import pytest
import torch
from served_engine import COUNT, Loaded, assert_same

from fairseq_moe_ext.checkpoints.errors import ClosedError
from fairseq_moe_ext.reporting.finite import NotFiniteError
from fairseq_moe_ext.serving.engine import FullError


@pytest.fixture(scope="module")
def bilingual(shared_goldens):
    return Loaded(shared_goldens / "mt_plain")


@pytest.fixture(scope="module")
def best(bilingual):
    """What fairseq finds best for every sentence, beam 4."""
    return [bilingual.alone(tokens) for tokens in bilingual.sentences]


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
