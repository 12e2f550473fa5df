#!/usr/bin/env bash
# What a capacity per expert costs in quality and gives in time: the tables of "Capacity-Aware Inference", and a plot.
#   bash scripts/reproduce_capacity_aware.sh [options]                      # the quickstart's two models
#   CHECKPOINT=model.pt DATA=data-bin bash scripts/reproduce_capacity_aware.sh   # any other
#   FLAGS="--task moe_translation -s en -t de"                              # more flags for its commands
# --help lists the options. Finished runs are reused.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup_environment.sh
export OMP_NUM_THREADS=1 # one thread: steadier to measure
export PYTHONWARNINGS=ignore
more=()
[ -z "${CHECKPOINT:-}" ] || more+=(--checkpoint "$CHECKPOINT")
[ -z "${DATA:-}" ] || more+=(--data "$DATA")
[ -z "${FLAGS:-}" ] || more+=("--flags=$FLAGS")
exec .venv/bin/python scripts/reproduce_capacity_aware.py ${more[@]+"${more[@]}"} "$@"
