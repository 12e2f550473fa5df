#!/usr/bin/env bash
# NLLB-200 from a Hugging Face folder to chrF++ in four commands, by way of one quantised file; by default a tiny random
# model, made here.
#   bash examples/nllb/quantized.sh
#   HF_DIR=nllb-moe-54b FLORES=flores200_dataset/devtest bash examples/nllb/quantized.sh   # the real one
# SOURCE, TARGET: languages (eng_Latn, deu_Latn); EXPERTS=int8; DEVICE=--cpu; FLAGS: more of the plugin's; WORK=folder for
# all that is written.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
[ -n "${PYTHON_BIN:-}" ] || { bash scripts/setup_environment.sh; PYTHON_BIN=$PWD/.venv/bin; }
export PATH=$PYTHON_BIN:$PATH PYTHONPATH=$PWD OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
work=${WORK:-examples/output}/nllb-quantized
source=${SOURCE:-eng_Latn} target=${TARGET:-deu_Latn}
mkdir -p "$work"

if [ -z "${HF_DIR:-}" ]; then
  python examples/nllb/make_tiny.py "$work/tiny"
  HF_DIR=$work/tiny/hf FLORES=$work/tiny/flores DEVICE=--cpu
  FLAGS=${FLAGS:---expert-buffer-size 4 --expert-store disk}
fi
model=$work/model.safetensors
text=$FLORES/devtest.$source reference=$FLORES/devtest.$target
[ -f "$text" ] || text=$FLORES/$source.devtest reference=$FLORES/$target.devtest # FLORES-200's own names

[ -f "$model" ] || python -m fairseq_moe_ext quantize "$HF_DIR" --output "$model" --experts "${EXPERTS:-int4}" --dense int8
python -m fairseq_moe_ext plan "$model" --device-memory "${DEVICE_MEMORY:-24GB}"
fairseq-interactive "$model" --user-dir fairseq_moe_ext --task moe_translation_multi_simple_epoch --path "$model" \
  -s "$source" -t "$target" --input "$text" --buffer-size 1024 --batch-size 16 --beam 4 --max-len-b 100 ${DEVICE:-} \
  ${FLAGS:-} 2>"$work/interactive.log" >"$work/translations.txt" || { tail -n 20 "$work/interactive.log" >&2; exit 1; }
grep '^D-' "$work/translations.txt" | cut -f3 >"$work/hypotheses.$target"
echo "chrF++ of $source to $target:"
sacrebleu "$reference" -i "$work/hypotheses.$target" -m chrf --chrf-word-order 2 -b
