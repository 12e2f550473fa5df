#!/usr/bin/env bash
# Sets everything up and passes the tests: bash tests/run.sh [--all] [pytest's arguments]
#   --all  also those marked slow; WORKERS=n: processes that share the tests (2)
# What a test costs: --durations=60 on quiet cores. Commands start as forks (tests/processes.py, `fresh=True` as users
# start them), so that nearly all of it is the test's own.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
marker=(-m "not slow")
if [ "${1:-}" = --all ]; then
  marker=(-m "slow or not slow")
  shift
fi
bash scripts/setup_environment.sh
unset PYTHONDONTWRITEBYTECODE # several hundred processes import the package: compiled once, not by each
# one thread per process: steadier and, at the tests' sizes, faster
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
.venv/bin/ruff check .
.venv/bin/mypy # what stands in pyproject.toml
exec .venv/bin/python -m pytest -n "${WORKERS:-2}" --dist worksteal "${marker[@]}" "$@"
