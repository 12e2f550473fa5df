"""What serving a model takes on the device, in main memory and on disk, and the flags to use; reads shapes only.

    fairseq-moe plan moe_transformer_nllb_54b
    fairseq-moe plan moe_transformer_nllb_54b --device-memory 24GB --moe-weights int4
    fairseq-moe plan nllb.pt --device-memory 80GB --host-memory 64GB --batch-size 8

SOURCE is a checkpoint as for --path, a folder in Hugging Face's layout, or an architecture's name. Without
--device-memory: the weights in every format, what a decode step of 1, 8 and 32 sentences and an encoder's pass over
one read of them (routing taken as uniform), and what fits 8 to 64 GiB of RAM or of a GPU. With it: the ways to serve on
such a GPU. Weights in float16 on a GPU (--fp32: float32), in float32 on a CPU, the experts' as --moe-weights says,
dense ones as --moe-weights-scope. Counted: weights, the batch's activations and caches, the process.
"""

from __future__ import annotations

from collections.abc import Sequence

from fairseq_moe_ext.checkpoints.errors import CheckpointError
from fairseq_moe_ext.command_line.parsing import byte_size, command_parser, failed, positive
from fairseq_moe_ext.experts.formats import ALL, DENSE, EXPERTS, FLOAT, FORMATS, SCOPES
from fairseq_moe_ext.models import moe_transformer, moe_transformer_lm  # noqa: F401  register architectures
from fairseq_moe_ext.serving.memory_plan import Workload, plan, read_sizes, table
from fairseq_moe_ext.serving.memory_sizes import table_of_formats, table_of_memories
from fairseq_moe_ext.tasks.weight_flags import check_weights_of_dense, check_weights_of_file


def main(arguments: Sequence[str] | None = None) -> int:
    """`fairseq-moe plan` with these arguments (default: the process's own); returns the exit code."""
    parser = command_parser("plan", __doc__)
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("--device-memory", type=byte_size, metavar="SIZE", help="of one GPU; default: usual ones")
    parser.add_argument("--host-memory", type=byte_size, metavar="SIZE", help="of the machine; default: what it takes")
    for name, value in (("--batch-size", 16), ("--beam", 4), ("--length", 128)):
        parser.add_argument(name, type=positive, default=value, metavar="N", help="default: %(default)s")
    parser.add_argument("--fp32", action="store_true", help="float32 on the GPU, too")
    parser.add_argument("--moe-weights", choices=FORMATS, help=f"of the experts; default: {FLOAT}")
    parser.add_argument(
        "--moe-weights-scope", choices=SCOPES, help=f"all: dense layers, too; default: {EXPERTS}"
    )
    args = parser.parse_args(arguments)
    if args.moe_weights_scope is not None and args.moe_weights in (None, FLOAT):
        parser.error(f"--moe-weights-scope {args.moe_weights_scope} needs --moe-weights int8 or int4, got {FLOAT}")
    for_one = ("host_memory", "fp32", "moe_weights", "moe_weights_scope")
    given = [f"--{name.replace('_', '-')}" for name in for_one if getattr(args, name) != parser.get_default(name)]
    if given and args.device_memory is None:
        parser.error(f"{given[0]} needs --device-memory: without it all formats and usual memories are shown")
    try:
        sizes = read_sizes(args.source)
        if not sizes.experts:
            check_weights_of_dense(args)
        if sizes.quantized is not None:
            experts, int8_dense = sizes.quantized
            dense = DENSE if int8_dense else "floats"
            check_weights_of_file(args.moe_weights, args.moe_weights_scope, args.source, experts, dense)
    except (CheckpointError, OSError, ValueError) as error:
        return failed(error)
    work = Workload(args.batch_size, args.beam, args.length, 4 if args.fp32 else 2)
    experts = f"{sizes.moe_layers} MoE layers of {sizes.experts} experts" if sizes.experts else "no experts"
    print(f"{sizes.parameters:,} parameters, {experts}, vocabulary {sizes.vocabulary:,}")
    if sizes.quantized is not None:
        form, int8_dense = sizes.quantized
        dense = ", dense layers in int8" if int8_dense else ""
        print(f"a quantised checkpoint of {sizes.file_bytes:,} bytes: experts in {form}{dense}")
    if sizes.kept is not None:
        print(f"{sizes.kept:,} experts are kept, at most so many of a layer")
    print()
    if args.device_memory is None:
        print(table_of_formats(sizes, work))
        sentences = "1 sentence" if args.batch_size == 1 else f"{args.batch_size} sentences"
        print(f"\nWith {sentences} of {args.length} tokens at a time, beam {args.beam}:\n")
        print(table_of_memories(sizes, work))
        return 0
    memory = args.device_memory, args.host_memory
    print(table(plan(sizes, *memory, work, args.moe_weights or FLOAT, args.moe_weights_scope == ALL)))
    return 0
