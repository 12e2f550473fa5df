#!/usr/bin/env bash
# Passes the unmarked tests with other versions, each in an environment of its own: bash tests/versions.sh [NAME ...]
#   oldest  every package of setup.py at its lower bound (the default, together with newest)
#   newest  the newest that pip finds within setup.py's bounds
#   X.Y.Z   that PyTorch, everything else as pip finds it
#
#   PYTHON=python3.12   the interpreter (python3)
#   FOLDER=DIR          where the environments lie and stay, about 7 GB each; default: a temporary folder, removed
#   TESTS="tests/gating -k loop"   pytest's arguments, in place of all; WORKERS=n: processes that share the tests (2)
#   INSTALL="..."       more arguments for pip
#
# The tests run in a copy of this checkout: nothing is installed into it, and what lies beside it as ../shared is linked.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
if [ -n "${FOLDER:-}" ]; then
  mkdir -p "$FOLDER"
  folder=$(cd "$FOLDER" && pwd)
else
  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' EXIT
fi
read -ra tests <<<"${TESTS:-}"
read -ra install <<<"${INSTALL:-}"
unset PYTHONPATH
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# What pip must take for NAME; PyTorch's own companions go by its version.
constraints() {
  "$python" - "$1" "$root/setup.py" <<'PY'
import re
import sys

name, setup = sys.argv[1], open(sys.argv[2], encoding="utf-8").read()
bounds = dict(re.findall(r'"([A-Za-z_-]+)>=([0-9.]+)', setup)) if name == "oldest" else {}
if name not in ("oldest", "newest"):
    bounds = {"torch": name}
bounds.pop("triton", None)  # PyTorch asks for one of its own
if "torch" in bounds and tuple(map(int, bounds["torch"].split(".")[:2])) < (2, 12):
    bounds["torchaudio"] = bounds["torch"]
print(*(f"{package}=={version}" for package, version in bounds.items()), sep="\n")
PY
}

failed=()
[ $# -gt 0 ] || set -- oldest newest
for name in "$@"; do
  home=$folder/$("$python" -c 'import sys; print("py%d.%d" % sys.version_info[:2])')-$name
  echo "== $name in $home"
  mkdir -p "$home"
  constraints "$name" >"$home/constraints.txt"
  [ -x "$home/env/bin/python" ] || "$python" -m venv "$home/env"
  rm -rf "$home/checkout" "$home/shared"
  mkdir "$home/checkout"
  git -C "$root" ls-files -z --cached --others --exclude-standard | tar -C "$root" --null --ignore-failed-read -T - -cf - |
    tar -C "$home/checkout" -xf -
  [ ! -d "$root/../shared" ] || ln -s "$(cd "$root/../shared" && pwd)" "$home/shared"
  if ! "$home/env/bin/python" -m pip install -c "$home/constraints.txt" "${install[@]}" -e "$home/checkout[test]" \
    >"$home/install.log" 2>&1; then
    tail -n 20 "$home/install.log" >&2
    failed+=("$name (installation)")
    continue
  fi
  "$home/env/bin/python" -m pip list --format=freeze 2>/dev/null >"$home/installed.txt"
  grep -iE '^(torch|triton|numpy|scipy|matplotlib|safetensors|sacrebleu|sentencepiece|fairseq.fixed)==' \
    "$home/installed.txt" | paste -sd ' '
  (cd "$home/checkout" && "$home/env/bin/python" -m pytest -p no:cacheprovider -q -n "${WORKERS:-2}" \
    --dist worksteal -m "not slow" "${tests[@]}") || failed+=("$name")
done
if [ "${#failed[@]}" -gt 0 ]; then
  printf 'failed with: %s\n' "${failed[@]}" >&2
  exit 1
fi
