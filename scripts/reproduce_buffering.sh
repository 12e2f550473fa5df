#!/usr/bin/env bash
# Miss rate, memory and time of an expert buffer, by size, policy and placement.
#   bash scripts/reproduce_buffering.sh [options]      # CHECKPOINT, DATA, FLAGS: as reproduce.sh says
exec bash "$(dirname "${BASH_SOURCE[0]}")/reproduce.sh" buffering "$@"
