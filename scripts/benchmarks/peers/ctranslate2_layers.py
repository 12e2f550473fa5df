"""Dense feed-forward layers of CTranslate2 in int8. Served by serve.py.

Its Python has no product of its own, so an encoder of random weights is converted twice, with all of the hidden dim
and with 64 features of it: the difference between their times is fc1, ReLU and fc2 of the other features, with the
quantising of rows, in every layer. All rows are sentences of one token. benchmark_quantized_peers.py subtracts.

Legend: L = layers (a case's experts), D = model dim, F = hidden dim.
"""

import os
import tempfile

import ctranslate2
import numpy as np
from ctranslate2.specs import Activation, TransformerEncoderModelSpec, TransformerEncoderSpec
from quantized_problem import Problem
from serve import Prepared, serve

NARROW = 64  # features of the hidden dim
WORDS = 16


def prepare(case: dict) -> Prepared:
    problem = Problem.of(case)
    calls = {}
    for name, hidden in {"whole": problem.hidden_dim, "narrow": NARROW}.items():
        encoder = build_encoder(problem, hidden)
        for count in case["rows"]:
            calls[f"CTranslate2, {name}|{count}"] = caller(encoder, count)
            calls[f"CTranslate2, {name}|{count}"]()
    return Prepared(calls, facts={"narrow": NARROW, "instructions": "int8 of one scale per row and per output"})


def caller(encoder: ctranslate2.Encoder, count: int):
    ids = [[each % WORDS] for each in range(count)]
    return lambda: encoder.forward_batch(ids)


def build_encoder(problem: Problem, hidden: int) -> ctranslate2.Encoder:
    dim, generator = problem.model_dim, np.random.default_rng(problem.seed)

    def linear(spec, outputs: int, inputs: int) -> None:
        spec.weight = generator.standard_normal((outputs, inputs), dtype=np.float32) * inputs**-0.5
        spec.bias = np.zeros(outputs, dtype=np.float32)

    def norm(spec) -> None:
        spec.gamma, spec.beta = np.ones(dim, dtype=np.float32), np.zeros(dim, dtype=np.float32)

    encoder = TransformerEncoderSpec(problem.experts, 16, pre_norm=True, activation=Activation.RELU)
    encoder.embeddings[0].weight = generator.standard_normal((WORDS, dim), dtype=np.float32)
    encoder.position_encodings.encodings = np.zeros((WORDS, dim), dtype=np.float32)
    norm(encoder.layer_norm)
    for layer in encoder.layer:
        norm(layer.self_attention.layer_norm)
        linear(layer.self_attention.linear[0], 3 * dim, dim)
        linear(layer.self_attention.linear[1], dim, dim)
        norm(layer.ffn.layer_norm)
        linear(layer.ffn.linear_0, hidden, dim)
        linear(layer.ffn.linear_1, dim, hidden)
    spec = TransformerEncoderModelSpec(encoder)
    spec.register_vocabulary([f"w{number}" for number in range(WORDS)])
    spec.validate()
    spec.optimize(quantization="int8")
    with tempfile.TemporaryDirectory() as folder:
        spec.save(folder)
        threads = int(os.environ["OMP_NUM_THREADS"])
        return ctranslate2.Encoder(folder, compute_type="int8", inter_threads=1, intra_threads=threads)


if __name__ == "__main__":
    serve(prepare)
