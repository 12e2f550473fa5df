#!/usr/bin/env bash
# Max Load and Avg Max Load of every way to place the experts.
#   bash scripts/reproduce_balancing.sh [options]      # CHECKPOINT, DATA, FLAGS: as reproduce.sh says
exec bash "$(dirname "${BASH_SOURCE[0]}")/reproduce.sh" balancing "$@"
