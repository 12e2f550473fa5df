#!/usr/bin/env bash
# A step on 8 to 256 ranks, modelled on recorded routing and measured costs, and the model held against real ranks.
#   bash scripts/reproduce_scaling.sh [options]      # CHECKPOINT, DATA, FLAGS: as reproduce.sh says
exec bash "$(dirname "${BASH_SOURCE[0]}")/reproduce.sh" scaling "$@"
