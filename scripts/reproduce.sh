#!/usr/bin/env bash
# What the reproduce_*.sh are made of: sets up the environment and starts a module of scripts/reproduction.
#   bash scripts/reproduce.sh activation [options]      # as reproduce_activation.sh [options]
#   CHECKPOINT=model.pt DATA=data-bin FLAGS="-s en -t de"   # instead of the quickstart's two models
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
name=${1:?the name of a module of scripts/reproduction}
shift
bash scripts/setup_environment.sh
export OMP_NUM_THREADS=1 # one thread: steadier to measure
export PYTHONWARNINGS=ignore PYTHONPATH="$PWD/scripts${PYTHONPATH:+:$PYTHONPATH}"
more=()
[ -z "${CHECKPOINT:-}" ] || more+=(--checkpoint "$CHECKPOINT")
[ -z "${DATA:-}" ] || more+=(--data "$DATA")
[ -z "${FLAGS:-}" ] || more+=("--flags=$FLAGS")
exec .venv/bin/python -m reproduction "$name" ${more[@]+"${more[@]}"} "$@"
