"""What serving a model takes on the device, in main memory and on disk, and the flags to use; reads shapes only.

    python scripts/plan_memory.py moe_transformer_nllb_54b --device-memory 24GB
    python scripts/plan_memory.py nllb.pt --device-memory 80GB --host-memory 64GB --batch-size 8

SOURCE is a checkpoint as for --path, a folder in Hugging Face's layout, or an architecture's name. Weights in float16
on a GPU (--fp32: float32), in float32 on a CPU. What is counted: fairseq_moe_ext/serving/memory_plan.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fairseq_moe_ext.byte_sizes import parse_bytes  # noqa: E402
from fairseq_moe_ext.models import moe_transformer, moe_transformer_lm  # noqa: E402, F401  register architectures
from fairseq_moe_ext.serving.errors import CheckpointError  # noqa: E402
from fairseq_moe_ext.serving.memory_plan import Workload, plan, read_sizes, table  # noqa: E402


def memory(text: str) -> int:
    """As every flag reads a size."""
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("--device-memory", type=memory, required=True, metavar="SIZE", help="of one GPU")
    parser.add_argument("--host-memory", type=memory, metavar="SIZE", help="of the machine; default: what it takes")
    for name, value in (("batch-size", 16), ("beam", 4), ("length", 128)):
        parser.add_argument(f"--{name}", type=positive, default=value, metavar="N", help="default: %(default)s")
    parser.add_argument("--fp32", action="store_true", help="float32 on the GPU, too")
    args = parser.parse_args(arguments)
    try:
        sizes = read_sizes(args.source)
    except (CheckpointError, OSError) as error:
        print(f"error: {str(error).removeprefix('--path ')}", file=sys.stderr)
        return 1
    work = Workload(args.batch_size, args.beam, args.length, 4 if args.fp32 else 2)
    experts = f"{sizes.moe_layers} MoE layers of {sizes.experts} experts" if sizes.experts else "no experts"
    print(f"{sizes.parameters:,} parameters, {experts}, vocabulary {sizes.vocabulary:,}\n")
    print(table(plan(sizes, args.device_memory, args.host_memory, work)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
