#!/usr/bin/env bash
# Peak activations and total memory, static against dynamic.
#   bash scripts/reproduce_memory.sh [options]      # CHECKPOINT, DATA, FLAGS: as reproduce.sh says
exec bash "$(dirname "${BASH_SOURCE[0]}")/reproduce.sh" memory "$@"
