#!/usr/bin/env bash
# From nothing to two served Mixture-of-Experts models: installs into .venv, makes data, trains a small language model
# and a small multilingual translation model on the CPU, serves both with fairseq's own commands under static and dynamic
# gating, and prints one table. Run again, it reuses what is there; WORK=folder puts its files elsewhere.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup_environment.sh
work=${WORK:-examples/output}
mkdir -p "$work"

updates() { # the last "num_updates=" of a training log
  grep -o 'num_updates=[0-9]*' "$work/$1/train.log" 2>/dev/null | tail -n 1 | cut -d= -f2 || true
}

started=$SECONDS
pids=()
set -m # each training in a process group of its own, so that Ctrl-C ends all of it
for example in language_modeling translation; do
  bash "examples/$example/run.sh" train &
  pids+=($!)
done
set +m
trap 'kill -- "${pids[@]/#/-}" 2>/dev/null || true' EXIT
while [ -n "$(jobs -rp)" ]; do
  printf '\rtraining on two cores: language model %s updates, translation model %s updates, %d s ' \
    "$(updates language_modeling)" "$(updates translation)" $((SECONDS - started)) >&2
  sleep 2
done
echo >&2
for pid in "${pids[@]}"; do wait "$pid"; done
trap - EXIT
for example in language_modeling translation; do
  echo "serving: $example, static and dynamic" >&2
  bash "examples/$example/run.sh" serve
done
echo
.venv/bin/python examples/table.py "$work/language_modeling" "$work/translation"
echo
echo "Both models were served by fairseq-eval-lm and fairseq-generate on one CPU thread; static gating at a capacity" \
  "fraction of 1.0, where nothing drops. Logs, reports and models are in $work; $((SECONDS - started)) s in all."
