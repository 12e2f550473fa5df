#!/usr/bin/env bash
# What a capacity per expert costs in quality and gives in time: the tables of "Capacity-Aware Inference", and a plot.
#   bash scripts/reproduce_capacity_aware.sh [options]      # CHECKPOINT, DATA, FLAGS: as reproduce.sh says
exec bash "$(dirname "${BASH_SOURCE[0]}")/reproduce.sh" capacity_aware "$@"
