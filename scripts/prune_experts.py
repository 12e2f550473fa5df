#!/usr/bin/env python3
"""`fairseq-moe prune` from a checkout, which need not be installed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fairseq_moe_ext.command_line import subcommand  # noqa: E402

main = subcommand("prune")

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
