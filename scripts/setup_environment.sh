#!/usr/bin/env bash
# Makes .venv in the repository, once, with everything the examples and the tests need. Sourced or run; prints one line.
#   PYTHON=python3.12 bash scripts/setup_environment.sh     # another interpreter
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null; then
  echo "fairseq_moe_ext needs Python 3.11 or 3.12; $python is $("$python" --version 2>&1)." \
    "Name another one: PYTHON=python3.11 before the same command." >&2
  exit 1
fi
stamp=$root/.venv/installed
wanted=$(cat "$root/constraints.txt" "$root/setup.py" "$root"/fairseq_moe_ext/kernels/cpu/* | cksum)
if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ]; then
  log=$root/.venv.log
  echo "installing into .venv (some minutes the first time; fairseq is compiled; progress in .venv.log)"
  [ -x "$root/.venv/bin/python" ] || "$python" -m venv "$root/.venv"
  if ! "$root/.venv/bin/python" -m pip install -c "$root/constraints.txt" -e "$root[test]" >"$log" 2>&1; then
    tail -n 20 "$log" >&2
    echo "the installation failed; the whole log is in .venv.log" \
      "(fairseq needs a C++ compiler and Python's headers where there is no wheel for it)" >&2
    exit 1
  fi
  echo "$wanted" >"$stamp"
fi
