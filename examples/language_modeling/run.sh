#!/usr/bin/env bash
# Trains a small MoE language model on the Python standard library's source text and serves it, static and dynamic.
#   bash examples/language_modeling/run.sh [train|serve]     # default: both; finished parts are reused
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
bash scripts/setup_environment.sh
export PATH=$PWD/.venv/bin:$PATH OMP_NUM_THREADS=1 # one thread: steadier to measure
work=${WORK:-examples/output}/language_modeling
mkdir -p "$work"

train() {
  [ -d "$work/text" ] || python examples/language_modeling/make_data.py --output "$work/text"
  if [ ! -d "$work/data-bin" ]; then
    rm -rf "$work/data-bin.partial"
    fairseq-preprocess --only-source --trainpref "$work/text/train.txt" --validpref "$work/text/valid.txt" \
      --testpref "$work/text/test.txt" --destdir "$work/data-bin.partial" --workers 1 >"$work/preprocess.log" 2>&1
    mv "$work/data-bin.partial" "$work/data-bin"
  fi
  if [ ! -f "$work/model.pt" ]; then
    fairseq-train "$work/data-bin" --cpu --user-dir fairseq_moe_ext --task moe_language_modeling \
      --arch moe_transformer_lm_tiny --moe-expert-count 32 --dropout 0.0 \
      --criterion moe_cross_entropy --moe-gate-loss-wt 0.01 \
      --optimizer adam --adam-betas '(0.9, 0.98)' --clip-norm 1.0 \
      --lr-scheduler polynomial_decay --lr 0.006 --warmup-updates 50 --max-update 700 --total-num-update 700 \
      --tokens-per-sample 128 --sample-break-mode none --max-tokens 1024 \
      --no-epoch-checkpoints --save-dir "$work/checkpoints" --log-format simple --log-interval 50 --num-workers 0 \
      >"$work/train.log" 2>&1 || { tail -n 20 "$work/train.log" >&2; exit 1; }
    cp "$work/checkpoints/checkpoint_last.pt" "$work/model.pt.partial"
    mv "$work/model.pt.partial" "$work/model.pt"
  fi
}

serve() {
  for gating in static dynamic; do
    capacity=()  # dynamic gating has none
    [[ "$gating" == static ]] && capacity=(--moe-eval-capacity-token-fraction 1.0)
    fairseq-eval-lm "$work/data-bin" --cpu --user-dir fairseq_moe_ext --task moe_language_modeling \
      --path "$work/model.pt" --gen-subset test --tokens-per-sample 128 --batch-size 8 \
      --moe-gating "$gating" "${capacity[@]}" --moe-report "$work/$gating.json" \
      >"$work/$gating.log" 2>&1 || { tail -n 20 "$work/$gating.log" >&2; exit 1; }
  done
}

case "${1:-all}" in
  train) train ;;
  serve) serve ;;
  all) train && serve && python examples/table.py "$work" ;;
  *) echo "$0: train, serve or nothing, got '$1'" >&2 && exit 2 ;;
esac
