#!/usr/bin/env python3
"""Time the whole NLLB-54B shape with random weights, made on the device, through the plugin's model and generator.

    python scripts/benchmarks/benchmark_random_model.py --device cuda --dtype float16 --output random_model.json
    python scripts/benchmarks/benchmark_random_model.py --layers 4 --model-dim 16 --hidden-dim 32 --experts 8

Static and dynamic gating, all experts resident and then in a buffer that leaves `--buffer-memory` GB in use: encoder
and decoder tokens per second at batch sizes that double until memory runs out. Sentences are random, all of one length,
and every hypothesis has `--steps` tokens, so that all of them do the same work. Tokens are drawn at random: a beam
search over random weights would say the same everywhere, and wake the same experts; how many are active in a pass
stands beside the figures. No expert is read from a file: the buffer's store holds a few experts in main memory and
gives every miss one of these, which takes as long to copy.

Legend: E = experts of a layer, D = model dim, F = hidden dim.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
from device_timing import add_device, check_device, default_dtype  # noqa: E402
from fairseq.data import Dictionary  # noqa: E402
from fairseq.models import ARCH_CONFIG_REGISTRY  # noqa: E402
from fairseq.search import Sampling  # noqa: E402
from made_models import dictionary  # noqa: E402
from torch import Tensor  # noqa: E402
from tqdm import tqdm  # noqa: E402

from fairseq_moe_ext.atomic_file import write_json  # noqa: E402
from fairseq_moe_ext.buffering.cache import BufferedExperts  # noqa: E402
from fairseq_moe_ext.buffering.eviction import DEFAULT_ORDER, DEFAULT_POLICY  # noqa: E402
from fairseq_moe_ext.buffering.slot_pool import STAGING_SLOTS  # noqa: E402
from fairseq_moe_ext.buffering.store import HostStore  # noqa: E402
from fairseq_moe_ext.command_line.parsing import positive  # noqa: E402
from fairseq_moe_ext.decoding.generator import MoESequenceGenerator  # noqa: E402
from fairseq_moe_ext.gating.slots import GATINGS, dispatcher_for  # noqa: E402
from fairseq_moe_ext.kernels.choice import KERNELS  # noqa: E402
from fairseq_moe_ext.models.moe_transformer import MoETransformerModel  # noqa: E402
from fairseq_moe_ext.reporting.observer import Observer  # noqa: E402
from fairseq_moe_ext.reporting.report import Report  # noqa: E402

ARCHITECTURE = "moe_transformer_nllb_54b"
SIDES = ("encoder", "decoder")
STORED_EXPERTS = 16  # that the store holds for all layers together
RESERVED = 0.15  # of the buffer's memory, for activations and a decoder's caches
GB = 1e9


class FewExperts(HostStore):
    """A store that gives every expert one of a few, which lie in main memory."""

    def load(self, expert: int, targets: Sequence[Tensor]) -> int:
        return super().load(expert % self._packed[0].size(0), targets)


def build_model(args: argparse.Namespace) -> MoETransformerModel:
    """The architecture with random weights on the device, in the dtype, ready to serve."""
    words = dictionary(args.vocabulary)
    fields = Namespace(dropout=0.0, attention_dropout=0.0, moe_expert_count=args.experts)
    for side in SIDES:
        setattr(fields, f"{side}_layers", args.layers)
        setattr(fields, f"{side}_embed_dim", args.model_dim)
        setattr(fields, f"{side}_ffn_embed_dim", args.hidden_dim)
        setattr(fields, f"{side}_attention_heads", max(1, args.model_dim // 128))
    ARCH_CONFIG_REGISTRY[ARCHITECTURE](fields)
    torch.manual_seed(args.seed)
    dtype = getattr(torch, args.dtype)
    with torch.device(args.device), default_dtype(dtype):
        model = MoETransformerModel.build_model(fields, Namespace(source_dictionary=words, target_dictionary=words))
    model = model.to(args.device, dtype).eval().requires_grad_(False)
    model.observer = Observer("random weights")
    model.prepare_for_inference_(Namespace(generation=Namespace(beam=args.beam), common=Namespace(seed=args.seed)))
    for layer in model.moe_layers().values():
        layer.experts.use_kernel(args.kernel)
    return model


def buffer_experts(model: MoETransformerModel, args: argparse.Namespace) -> int:
    """Put a buffer in the place of every layer's experts, whose memory is given back -> experts in each."""
    layers = list(model.moe_layers().values())
    device, dtype = layers[0].experts.device, layers[0].experts.dtype
    some = layers[0].experts
    stored = min(STORED_EXPERTS, args.experts)
    parts = [[parameter[number].cpu() for parameter in some.parameters()] for number in range(stored)]
    store = FewExperts(parts, dtype)
    dim, inner = args.model_dim, args.hidden_dim
    shapes = (("fc1.weight", (inner, dim)), ("fc1.bias", (inner,)), ("fc2.weight", (dim, inner)), ("fc2.bias", (dim,)))
    for layer in layers:
        buffered = BufferedExperts(
            args.experts,
            args.model_dim,
            args.hidden_dim,
            some.activation,
            make_store=lambda weights, dtype: store,
            policy=DEFAULT_POLICY,
            order=DEFAULT_ORDER,
        )
        layer.use(experts=buffered.eval().to(device, dtype))
        with torch.device("meta"):
            buffered.load_state_dict({
                f"{number}.{name}": torch.empty(shape) for number in range(args.experts) for name, shape in shapes
            })
    expert_bytes = some.expert_bytes
    del some
    model.observer.model_ready(model)  # lets go of the experts that were resident
    free_memory(device)
    size = args.buffer_size
    if size is None:
        used = sum(parameter.nbytes for parameter in model.parameters())
        room = args.buffer_memory * GB * (1 - RESERVED) - used
        size = int(room // (expert_bytes * len(layers))) - STAGING_SLOTS  # each layer has a pool of its own
    size = max(1, min(size, args.experts))
    for layer in layers:
        layer.experts.start(size)
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, args.buffer_memory * GB / total), device)
    return size


def free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def generate(model: MoETransformerModel, words: Dictionary, batch: int, steps: int, args: argparse.Namespace) -> dict:
    """Translate `batch` random sentences into `steps` tokens each -> what it took."""
    device = torch.device(args.device)
    generator = torch.Generator().manual_seed(args.seed)
    source = torch.randint(words.nspecial, len(words), (batch, args.source_length), generator=generator)
    source[:, -1] = words.eos()
    source = source.to(device)
    # the end of a hypothesis is one of its tokens
    lengths = {"max_len_b": steps - 1, "min_len": steps - 1}
    translate = MoESequenceGenerator([model], words, args.beam, search_strategy=Sampling(words), **lengths)
    sample = {"net_input": {"src_tokens": source, "src_lengths": source.new_full((batch,), args.source_length)}}
    report = model.observer.report
    before = [_figures(report, side) for side in SIDES]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    hypotheses = translate.generate([model], sample)
    seconds = time.perf_counter() - start
    assert all(len(sentence[0]["tokens"]) == steps for sentence in hypotheses)
    found = {"batch": batch, "steps": steps, "seconds": seconds}
    for side, earlier in zip(SIDES, before, strict=True):
        tokens, passes, spent, calls, active = (
            now - then for now, then in zip(_figures(report, side), earlier, strict=True)
        )
        found[f"{side}_tokens"] = tokens
        found[f"{side}_tokens_per_second"] = tokens / spent
        found[f"{side}_ms_per_pass"] = 1000 * spent / passes
        found[f"{side}_active_experts"] = active / calls
    if device.type == "cuda":
        found["peak_bytes"] = torch.cuda.max_memory_allocated(device)
    return found


def _figures(report: Report, side: str) -> tuple[float, ...]:
    """Sums so far of one side: tokens, passes, seconds, calls of its MoE layers, experts active in them."""
    totals = getattr(report, side)
    layers = [layer for name, layer in report.layers.items() if name.startswith(side)]
    calls, active = (sum(getattr(layer, name) for layer in layers) for name in ("calls", "active_experts"))
    return totals.tokens, totals.steps, totals.seconds, calls, active


def measure(model: MoETransformerModel, words: Dictionary, args: argparse.Namespace, keep) -> None:
    """Double the batch until memory runs out, or the time or the largest batch is reached; `keep` takes each row."""
    batch, start, largest = args.batch, time.perf_counter(), 0
    ended = "the largest batch asked for"
    while batch <= args.max_batch:
        if largest and time.perf_counter() - start > args.seconds:
            ended = "time"
            break
        try:
            with torch.inference_mode():
                generate(model, words, batch, 2, args)  # compiles kernels, and finds whether memory is enough
                found = generate(model, words, batch, args.steps, args)
        except RuntimeError as error:  # of which running out of memory is one
            out_of_memory = isinstance(error, torch.OutOfMemoryError)
            ended = "memory" if out_of_memory else f"error: {str(error).splitlines()[0]}"
            del error
            free_memory(torch.device(args.device))
            break
        keep(found)
        largest, batch = batch, batch * 2
    keep({"largest_batch": largest, "ended_by": ended})


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=24, help="of the encoder, and of the decoder; every 4th is MoE")
    parser.add_argument("--model-dim", type=int, default=2048, help="D")
    parser.add_argument("--hidden-dim", type=positive, default=8192, help="F")
    parser.add_argument("--experts", type=int, default=128, help="E")
    parser.add_argument("--vocabulary", type=int, default=256206, help="words")
    parser.add_argument("--source-length", type=positive, default=32, help="tokens of a sentence")
    parser.add_argument("--steps", type=int, default=16, help="tokens of a hypothesis")
    parser.add_argument("--beam", type=int, default=4)
    parser.add_argument("--batch", type=positive, default=16, help="sentences of the first batch")
    parser.add_argument("--max-batch", type=positive, default=4096, help="sentences of the largest batch that is tried")
    parser.add_argument("--gating", nargs="+", default=GATINGS, choices=GATINGS)
    parser.add_argument("--experts-in", nargs="+", default=("memory", "buffer"), choices=("memory", "buffer"))
    parser.add_argument("--buffer-memory", type=float, default=24.0, help="GB of the device in use with a buffer")
    parser.add_argument("--buffer-size", type=int, help="experts in a buffer; default: what fits in --buffer-memory")
    parser.add_argument("--kernel", default="auto", choices=KERNELS, help="of resident experts under dynamic gating")
    add_device(parser)
    parser.add_argument("--seconds", type=float, default=40.0, help="no larger batch is begun after so long")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    for name, least in (("layers", 4), ("experts", 2), ("steps", 2), ("vocabulary", 16), ("model_dim", 4)):
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(args, name)}")
    check_device(args, parser)
    return args


def main() -> None:
    args = parse_arguments()
    start = time.perf_counter()
    model = build_model(args)
    words = model.encoder.dictionary
    experts = next(iter(model.moe_layers().values())).experts
    kernel = experts.kernel_for(torch.device(args.device), experts.dtype)
    del experts
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{parameters / 1e9:.2f} billion parameters in {args.dtype} on {args.device} after "
        f"{time.perf_counter() - start:.0f} s; kernel: {kernel}"
    )
    results: list[dict] = []
    bar = tqdm(total=len(args.experts_in) * len(args.gating), disable=None)

    def keep(row: dict) -> None:
        results.append({"gating": gating, "experts_in": place, "experts_resident": size, **row})
        _print(results[-1])
        if args.output is not None:
            write_json(args.output, results, "--output")

    for place in sorted(args.experts_in, reverse=True):  # the buffer comes last: it takes the experts' place
        size = args.experts if place == "memory" else buffer_experts(model, args)
        for gating in args.gating:
            for layer in model.moe_layers().values():
                layer.use(dispatcher=dispatcher_for(gating))
            measure(model, words, args, keep)
            bar.update()
    bar.close()


def _print(row: dict) -> None:
    name = f"{row['gating']}, {row['experts_resident']} experts in {row['experts_in']}"
    if "largest_batch" in row:
        line = f"{name}: largest batch {row['largest_batch']}, ended by {row['ended_by']}"
    else:
        line = (
            f"{name}: batch {row['batch']}: encoder {row['encoder_tokens_per_second']:,.0f} tokens/s, decoder "
            f"{row['decoder_tokens_per_second']:,.0f} tokens/s ({row['decoder_ms_per_pass']:.1f} ms a step); "
            f"{row['encoder_active_experts']:.0f} and {row['decoder_active_experts']:.0f} experts active"
        )
        if "peak_bytes" in row:
            line += f", peak {row['peak_bytes'] / GB:.1f} GB"
    tqdm.write(line)


if __name__ == "__main__":
    main()
