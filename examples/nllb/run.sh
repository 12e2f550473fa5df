#!/usr/bin/env bash
# NLLB-200 from a Hugging Face folder to translations with chrF++ and spBLEU; by default a tiny random model, made here.
#   bash examples/nllb/run.sh
#   HF_DIR=nllb-moe-54b FLORES=flores200_dataset/devtest DTYPE=float16 FLAGS="--expert-buffer-size auto" \
#       bash examples/nllb/run.sh                      # the real one; finished parts are reused
# SOURCE, TARGET: languages (eng_Latn, deu_Latn); DICTIONARY: Meta's dictionary.txt (default: the SentencePiece model's
# order); DEVICE=--cpu; WORK=folder for all that is written.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
[ -n "${PYTHON_BIN:-}" ] || { bash scripts/setup_environment.sh; PYTHON_BIN=$PWD/.venv/bin; }
export PATH=$PYTHON_BIN:$PATH PYTHONPATH=$PWD OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
work=${WORK:-examples/output}/nllb
source=${SOURCE:-eng_Latn} target=${TARGET:-deu_Latn}
mkdir -p "$work"

if [ -z "${HF_DIR:-}" ]; then
  python examples/nllb/make_tiny.py "$work/tiny"
  HF_DIR=$work/tiny/hf FLORES=$work/tiny/flores DEVICE=--cpu
  FLAGS=${FLAGS:---expert-buffer-size 4 --expert-store disk}
fi
spm=$HF_DIR/sentencepiece.bpe.model

if [ ! -f "$work/model.pt" ]; then
  python scripts/convert_nllb_moe.py "$HF_DIR" --output "$work/model.pt" ${DTYPE:+--dtype "$DTYPE"} \
    ${DICTIONARY:+--dictionary "$DICTIONARY"}
fi
python scripts/plan_memory.py "$work/model.pt" --device-memory "${DEVICE_MEMORY:-24GB}"

rm -rf "$work/text" "$work/data-bin"
mkdir -p "$work/text"
for language in "$source" "$target"; do
  file=$FLORES/devtest.$language
  [ -f "$file" ] || file=$FLORES/$language.devtest # FLORES-200's own names
  cp "$file" "$work/text/reference.$language"
  python examples/nllb/encode.py "$spm" <"$file" >"$work/text/test.$language"
done
fairseq-preprocess --source-lang "$source" --target-lang "$target" --testpref "$work/text/test" \
  --srcdict "$work/model.dict.txt" --tgtdict "$work/model.dict.txt" --destdir "$work/data-bin" --workers 1 \
  >"$work/preprocess.log" 2>&1 || { tail -n 20 "$work/preprocess.log" >&2; exit 1; }

serve=(--user-dir fairseq_moe_ext --task moe_translation_multi_simple_epoch -s "$source" -t "$target"
  --lang-pairs "$source-$target" --lang-dict "$work/model.langs.txt" --fixed-dictionary "$work/model.dict.txt"
  --encoder-langtok src --decoder-langtok --add-data-source-prefix-tags
  --path "$work/model.pt" --beam 4 --max-len-b 100 ${DEVICE:-} ${FLAGS:-})

fairseq-generate "$work/data-bin" "${serve[@]}" --gen-subset test --batch-size 16 --remove-bpe sentencepiece \
  --moe-report "$work/report.json" >"$work/generate.txt" 2>"$work/generate.log" ||
  { tail -n 20 "$work/generate.log" >&2; exit 1; }
# the hypotheses in the order of the sentences, without the language token
grep '^D-' "$work/generate.txt" | sort -t- -k2,2n | cut -f3 | sed "s/^__${target}__ *//" >"$work/hypotheses.$target"

echo "chrF++ and spBLEU of $source to $target:"
sacrebleu "$work/text/reference.$target" -i "$work/hypotheses.$target" -m chrf --chrf-word-order 2 -b
# spBLEU is BLEU over SentencePiece's pieces; sacrebleu's flores200 tokenizer downloads the same model
python examples/nllb/encode.py "$spm" <"$work/hypotheses.$target" >"$work/hypotheses.pieces"
sacrebleu "$work/text/test.$target" -i "$work/hypotheses.pieces" -m bleu --tokenize none --force -b

echo "fairseq-interactive:"
head -n 2 "$work/text/reference.$source" | python examples/nllb/encode.py "$spm" |
  fairseq-interactive "$work/data-bin" "${serve[@]}" --remove-bpe sentencepiece 2>"$work/interactive.log" | grep '^[SD]-' ||
  { tail -n 20 "$work/interactive.log" >&2; exit 1; }
