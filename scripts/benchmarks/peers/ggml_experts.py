"""Experts by ggml, fc1, ReLU, fc2 without biases, in Q8_0 and Q4_0 (groups of 32 inputs). Served by serve.py.

`mul_mat_id` is what llama.cpp computes the experts of a MoE layer by; `mul_mat` is its product of one matrix, called
for one expert after another. Repacked weights are what llama.cpp lays Q4_0 out as when it loads a model.
"""

import os
from collections.abc import Callable

import torch
from ggml_library import Ggml
from quantized_problem import Problem, relative_error
from serve import Prepared, serve
from torch import Tensor

MATRICES = (("Q8_0", False), ("Q4_0", False), ("Q4_0", True))
MOST = {"Q8_0": 0.03, "Q4_0": 0.3}  # the largest relative error of outputs by those of float32


def prepare(case: dict) -> Prepared:
    problem = Problem.of(case)
    ggml = Ggml(int(os.environ["OMP_NUM_THREADS"]))
    fc1, fc2 = problem.weights()
    calls = {}
    for kind, repacked in MATRICES:
        together = ggml.weights(kind, (fc1, fc2), repacked)
        alone = ggml.weights(kind, [*fc1, *fc2], repacked)
        name = f"ggml {kind}{' repacked' if repacked else ''}"
        for count in case["rows"]:
            rows = problem.rows(count)
            for product, built in (
                ("mul_mat_id", by_ids(ggml, together, rows)),
                ("mul_mat", one_by_one(ggml, alone, rows)),
            ):
                run, read = built
                run()
                error = relative_error(read(), torch.relu(rows @ fc1.transpose(1, 2)) @ fc2.transpose(1, 2))
                assert error <= MOST[kind], f"{name} is off by {error:.3g}, at most {MOST[kind]} is right"
                calls[f"{name}, {product}|{count}"] = run
    return Prepared(calls, facts={"instructions": ggml.instructions()})


def by_ids(ggml: Ggml, weights: list[int], rows: Tensor) -> tuple[Callable, Callable]:
    """rows (E, n, D) -> what computes them, and what reads (E, n, D)."""
    graph = ggml.graph()
    experts, count, dim = rows.shape
    ids = graph.input(torch.arange(experts, dtype=torch.int32).repeat_interleave(count)[:, None])
    hidden = graph.relu(graph.multiply(weights[0], graph.input(rows.reshape(-1, 1, dim)), ids))
    outputs = graph.output(graph.multiply(weights[1], hidden, ids))
    graph.ready()
    return graph.run, lambda: graph.read(outputs, *rows.shape)


def one_by_one(ggml: Ggml, weights: list[int], rows: Tensor) -> tuple[Callable, Callable]:
    graph = ggml.graph()
    experts = len(rows)
    outputs = []
    for its, fc1, fc2 in zip(rows, weights[:experts], weights[experts:], strict=True):
        hidden = graph.relu(graph.multiply(fc1, graph.input(its)))
        outputs.append(graph.output(graph.multiply(fc2, hidden)))
    graph.ready()
    return graph.run, lambda: torch.stack([graph.read(output, *rows.shape[1:]) for output in outputs])


if __name__ == "__main__":
    serve(prepare)
