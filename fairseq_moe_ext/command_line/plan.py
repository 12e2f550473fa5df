"""What serving a model takes on the device, in main memory and on disk, and the flags to use; reads shapes only.

    fairseq-moe plan moe_transformer_nllb_54b --device-memory 24GB
    fairseq-moe plan nllb.pt --device-memory 80GB --host-memory 64GB --batch-size 8

    fairseq-moe plan moe_transformer_nllb_54b --device-memory 24GB --moe-weights int4

SOURCE is a checkpoint as for --path, a folder in Hugging Face's layout, or an architecture's name. Weights in float16
on a GPU (--fp32: float32), in float32 on a CPU, the experts' as --moe-weights says, dense ones as
--moe-weights-scope. Counted: weights, the batch's
activations and caches, the process.
"""

from __future__ import annotations

from collections.abc import Sequence

from fairseq_moe_ext.checkpoints.errors import CheckpointError
from fairseq_moe_ext.command_line.parsing import byte_size, command_parser, failed, positive
from fairseq_moe_ext.experts.formats import ALL, EXPERTS, FLOAT, FORMATS, SCOPES
from fairseq_moe_ext.models import moe_transformer, moe_transformer_lm  # noqa: F401  register architectures
from fairseq_moe_ext.serving.memory_plan import Workload, plan, read_sizes, table


def main(arguments: Sequence[str] | None = None) -> int:
    """`fairseq-moe plan` with these arguments (default: the process's own); returns the exit code."""
    parser = command_parser("plan", __doc__)
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("--device-memory", type=byte_size, required=True, metavar="SIZE", help="of one GPU")
    parser.add_argument("--host-memory", type=byte_size, metavar="SIZE", help="of the machine; default: what it takes")
    for name, value in (("batch-size", 16), ("beam", 4), ("length", 128)):
        parser.add_argument(f"--{name}", type=positive, default=value, metavar="N", help="default: %(default)s")
    parser.add_argument("--fp32", action="store_true", help="float32 on the GPU, too")
    parser.add_argument("--moe-weights", choices=FORMATS, default=FLOAT, help="of the experts; default: %(default)s")
    parser.add_argument(
        "--moe-weights-scope", choices=SCOPES, default=EXPERTS, help="all: dense layers, too; default: %(default)s"
    )
    args = parser.parse_args(arguments)
    if args.moe_weights_scope == ALL and args.moe_weights == FLOAT:
        parser.error(f"--moe-weights-scope {ALL} needs --moe-weights int8 or int4, got {FLOAT}")
    try:
        sizes = read_sizes(args.source)
    except (CheckpointError, OSError) as error:
        return failed(error)
    work = Workload(args.batch_size, args.beam, args.length, 4 if args.fp32 else 2)
    experts = f"{sizes.moe_layers} MoE layers of {sizes.experts} experts" if sizes.experts else "no experts"
    print(f"{sizes.parameters:,} parameters, {experts}, vocabulary {sizes.vocabulary:,}\n")
    memory = args.device_memory, args.host_memory
    print(table(plan(sizes, *memory, work, args.moe_weights, args.moe_weights_scope == ALL)))
    return 0
