"""What is counted: passes that are done, on the device where the model is, for as long as the model is there."""

from __future__ import annotations

import gc
import os
import threading
import weakref
from argparse import Namespace

import pytest
import torch
from model_makers import language_model, sentences, translation_input, translation_model

from fairseq_moe_ext.reporting.observer import Observer
from fairseq_moe_ext.serving.expert_buffer import BufferSettings, ExpertBuffer

INFERENCE = Namespace(
    generation=Namespace(beam=1, retain_dropout=False, retain_dropout_modules=None), common=Namespace(seed=1)
)
MAKERS = {"lm": language_model, "mt": translation_model}


def served(kind: str, trace=None, buffer: BufferSettings | None = None):
    """A model in service, and its observer."""
    model = MAKERS[kind]().eval()
    if buffer is not None:
        state = model.state_dict()
        model = MAKERS[kind](seed=1, allocate_experts=False, initialize_experts=False).eval()
        model.expert_buffer = ExpertBuffer(buffer)
        model.expert_buffer.install(model.moe_layers())
        model.load_state_dict(state)
    model.observer = Observer("dynamic", None, trace)
    model.prepare_for_inference_(INFERENCE)
    return model, model.observer


@torch.no_grad()
def run(model) -> torch.Tensor:
    if hasattr(model, "encoder"):
        return model(**translation_input())[0]
    return model(sentences())[0]


def counted(observer) -> dict:
    """The report without its times and what the process took."""
    observer.report.close()
    report = observer.report.as_dict()
    for part in ("encoder", "decoder"):
        if part in report:
            del report[part]["seconds"], report[part]["tokens_per_second"]
    for layer in report["layers"]:
        del layer["seconds"]
    del report["memory"], report["ranks"][0]["peak_rss_bytes"]
    return report


class Failing:
    """Experts that have no memory for their call, once."""

    def __init__(self, experts, after: bool):
        self._experts, self._run, self._after = experts, experts.run, after
        experts.run = self

    def __call__(self, *arguments):
        del self._experts.run
        if self._after:
            self._run(*arguments)
        raise torch.OutOfMemoryError("no memory")


@pytest.mark.parametrize("after", [True, False])
@pytest.mark.parametrize(("kind", "number"), [("lm", 0), ("lm", -1), ("mt", 0)])
@pytest.mark.parametrize("buffer", [None, BufferSettings(2, "all", "lru", "ascending", "host")])
def test_a_pass_that_raised_and_was_tried_again_is_counted_once(tmp_path, kind, number, after, buffer):
    (model, observer), (other, wanted) = (served(kind, tmp_path / "trace.npz", buffer) for _ in range(2))
    outputs = run(other), run(other)
    found = [run(model)]
    Failing(list(model.moe_layers().values())[number].experts, after)
    with pytest.raises(torch.OutOfMemoryError):
        run(model)
    found.append(run(model))
    assert all(map(torch.equal, found, outputs))
    report, wanted_report = counted(observer), counted(wanted)
    if buffer is not None:  # who is resident after the failure is another matter
        for each in (report, wanted_report):
            del each["ranks"][0]["hits"], each["ranks"][0]["misses"]
            for layer in each["layers"]:
                layer["accesses"] = layer.pop("hits") + layer.pop("misses")
                for name in ("bytes_copied", "host_reads", "disk_reads", "bytes_read"):
                    del layer[name]
    assert report == wanted_report
    trace, wanted_trace = observer._recorder.trace(), wanted._recorder.trace()
    assert trace.keys() == wanted_trace.keys() and trace
    for phase, recorded in trace.items():
        assert recorded.load.tolist() == wanted_trace[phase].load.tolist()


class Elsewhere:
    """A model as its observer sees it, which says that it is on a GPU."""

    def __init__(self, model):
        self._model, self.device = model, torch.device("cpu")

    def parameters(self):
        for parameter in self._model.parameters():
            yield Namespace(device=self.device, dtype=parameter.dtype)

    def modules(self):
        return self._model.modules()

    def moe_layers(self):
        return self._model.moe_layers()


def test_clocks_wait_for_the_device_where_the_model_is(monkeypatch):
    """It may move at any time after it was prepared."""
    model, observer = served("lm")
    waits = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: waits.append(1))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *_: 5)
    elsewhere = Elsewhere(model)
    observer.model_ready(elsewhere)
    for device in ("cpu", "cuda:1", "cpu", "cuda:0"):
        elsewhere.device = torch.device(device)
        waits.clear()
        run(model)
        assert len(waits) == (2 if device != "cpu" else 0)
        report = counted(observer)
        assert report["device"] == device
        assert report["ranks"][0]["peak_device_bytes"] == (5 if device != "cpu" else 0)
    assert report["decoder"]["steps"] == 4


def test_another_preparation_changes_nothing_that_was_counted():
    (model, observer), (other, wanted) = served("lm"), served("lm")
    run(model), run(other)
    model.prepare_for_inference_(INFERENCE)
    run(model), run(other)
    assert counted(observer) == counted(wanted)


def test_the_report_follows_the_dtype():
    model, observer = served("lm")
    run(model)
    model.half()
    run(model)
    layers = model.moe_layers().values()
    assert counted(observer)["dtype"] == "float16"
    assert observer.report.as_dict()["memory"]["expert_bytes_total"] == sum(each.experts.total_bytes for each in layers)


@pytest.mark.parametrize("buffer", [None, "host", "disk"])
def test_a_report_does_not_keep_its_model(tmp_path, buffer):
    """The observer goes on, and knows what it has seen."""
    settings = None if buffer is None else BufferSettings(2, "all", "lru", "ascending", buffer, tmp_path)
    model, observer = served("lm", buffer=settings)
    run(model)
    before = counted(observer)
    gone = [weakref.ref(module) for layer in model.moe_layers().values() for module in (layer, layer.experts)]
    del model
    gc.collect()  # fairseq's stacks refer to themselves
    assert [each() for each in gone] == [None] * len(gone)
    assert counted(observer) == before
    assert before["ranks"][0]["expert_bytes"] > 0


def test_threads_and_files_go_with_their_models(tmp_path):
    """One model after another in one process, each prepared twice."""
    settings = BufferSettings(2, "all", "lru", "ascending", "disk", tmp_path)

    def serve():
        model, _ = served("lm", buffer=settings)
        model.prepare_for_inference_(INFERENCE)
        run(model)
        found = {thread for thread in threading.enumerate() if thread.name.startswith("experts")} - threads
        assert len(found) == len(model.moe_layers())
        return found

    threads, files = set(threading.enumerate()), []
    for _ in range(3):
        started = serve()
        gc.collect()
        for thread in started:
            thread.join(timeout=20)
            assert not thread.is_alive()
        files.append(len(os.listdir("/proc/self/fd")))
    assert files[2] == files[0]
