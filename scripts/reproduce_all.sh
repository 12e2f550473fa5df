#!/usr/bin/env bash
# Every table and figure of the papers, one script after the other, and results/REPORT.md with all of them.
#   bash scripts/reproduce_all.sh                          # the quickstart's two models; resumable
#   CHECKPOINT=model.pt DATA=data-bin FLAGS="-s en -t de" bash scripts/reproduce_all.sh
# --help says this. One that fails does not stop the others; the end names it.
set -euo pipefail
if [ $# -gt 0 ]; then
  sed -n '2,5s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
  [ "$1" = --help ] && exit 0
  echo "it takes no options; those of each script: bash scripts/reproduce_NAME.sh --help" >&2
  exit 2
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
names=(configurations characterization activation throughput memory buffering balancing scaling capacity_aware)
failed=() number=0 start=$SECONDS
for name in "${names[@]}"; do
  number=$((number + 1)) begin=$SECONDS
  echo "[$number/${#names[@]}] $name"
  bash "scripts/reproduce_$name.sh" >/dev/null || failed+=("$name")
  echo "    $((SECONDS - begin)) s"
done
CHECKPOINT="" DATA="" FLAGS="" bash scripts/reproduce.sh report # which takes no model
echo "all of it took $(((SECONDS - start) / 60)) min $(((SECONDS - start) % 60)) s"
if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}" >&2
  exit 1
fi
