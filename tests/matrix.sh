#!/usr/bin/env bash
# Passes the unmarked tests in every environment that a CPU may be: bash tests/matrix.sh [pytest's arguments]
# FAIRSEQ_MOE_CPU_KERNEL stands beside ATEN_CPU_CAPABILITY, which says nothing to the C kernel.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
failed=()
under() {
  echo "== $*"
  env "$@" bash tests/run.sh "${arguments[@]}" || failed+=("$*")
}
arguments=("$@")
under OMP_NUM_THREADS=1
if grep -qw avx2 /proc/cpuinfo; then
  under OMP_NUM_THREADS=1 ATEN_CPU_CAPABILITY=avx2 FAIRSEQ_MOE_CPU_KERNEL=avx2
fi
under OMP_NUM_THREADS=1 FAIRSEQ_MOE_CPU_KERNEL=off
under OMP_NUM_THREADS=4
if [ "${#failed[@]}" -gt 0 ]; then
  printf 'failed under: %s\n' "${failed[@]}" >&2
  exit 1
fi
