#!/usr/bin/env bash
# Takes all measurements that want a GPU, in less than 9 minutes, and writes one folder of results.
#   bash scripts/benchmarks/measure_gpu.sh                              # docs/results/gpu-<name>-<date>/
#   bash scripts/benchmarks/measure_gpu.sh --device cpu --small         # whether it runs: tiny shapes, no GPU, figures of no worth
#   --output FOLDER   --only "STEP STEP"   --limit SECONDS   # PYTHON=...: the interpreter (.venv's, or python3)
# The most valuable comes first; every step has a limit of its own, and one that fails is recorded while the rest goes on.
# The exit status is that of the last failure.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
device=cuda small= output= only= limit=520
while [ $# -gt 0 ]; do
  case $1 in
    --small) small=1 ;;
    --device | --output | --only | --limit)
      [ $# -gt 1 ] || { echo "$1 needs a value" >&2; exit 2; }
      declare "${1#--}=$2"
      shift
      ;;
    *) echo "unknown option $1; see the head of $0" >&2; exit 2 ;;
  esac
  shift
done
case $device in cpu | cuda) ;; *) echo "--device must be cpu or cuda, got $device" >&2; exit 2 ;; esac
[[ $limit =~ ^[0-9]+$ ]] || { echo "--limit must be a number of seconds, got $limit" >&2; exit 2; }
python=${PYTHON:-python3}
[ -n "${PYTHON:-}" ] || [ ! -x .venv/bin/python ] || python=.venv/bin/python
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PYTHONWARNINGS=ignore PYTHONUNBUFFERED=1

# the device and the versions, in words; its first line names the folder
machine=$("$python" - "$device" <<'PYTHON'
import platform, re, sys, torch
device = sys.argv[1]
if device == "cuda" and not torch.cuda.is_available():
    sys.exit("--device must be cpu where PyTorch finds no GPU, got cuda")
try:
    import triton
    version = triton.__version__
except ImportError:
    version = "none"
name, words = "CPU", platform.processor() or platform.machine()
if device == "cuda":
    found = torch.cuda.get_device_properties(0)
    name, cores = found.name, found.multi_processor_count
    words = f"{name}, {found.total_memory / 1e9:.0f} GB, compute capability {found.major}.{found.minor}, {cores} cores"
print(re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"))
print(f"Device: {words}")
print(f"PyTorch {torch.__version__}, CUDA {torch.version.cuda}, Triton {version}, Python {platform.python_version()}")
PYTHON
) || { echo "nothing was measured" >&2; exit 1; }
output=${output:-docs/results/gpu-$(head -n 1 <<<"$machine")-$(date +%F)}
mkdir -p "$output"
{
  echo "# Measured by scripts/benchmarks/measure_gpu.sh${small:+ --small}, $(date +%F)"
  echo
  tail -n +2 <<<"$machine" | sed 's/$/  /'
  echo "Code: $(git describe --always --dirty 2>/dev/null || echo 'not under git')"
  [ "$device" = cpu ] || nvidia-smi --query-gpu=driver_version,clocks.max.sm,clocks.max.mem --format=csv,noheader \
    2>/dev/null | sed 's/^/Driver and clocks: /'
  echo
  echo "| step | seconds | outcome | command |"
  echo "|---|---|---|---|"
} >"$output/README.md"
cat "$output/README.md"

failure=0
# name, limit in seconds, command: what it prints goes to <name>.txt; {} stands for the folder
step() {
  local name=$1 most=$2 left=$((limit - SECONDS)) start=$SECONDS status=0
  shift 2
  [ -z "$only" ] || [[ " $only " == *" $name "* ]] || return 0
  [ "$most" -lt "$left" ] || most=$left
  if [ "$most" -lt 5 ]; then
    status=124
    echo "left out: no time was left" >"$output/$name.txt"
  else
    timeout --kill-after=5 "$most" "${@//\{\}/$output}" >"$output/$name.txt" 2>&1 </dev/null || status=$?
  fi
  local outcome=done
  [ $status -eq 0 ] || { failure=$status outcome="failed ($status)"; }
  [ $status -ne 124 ] || outcome="stopped after $most s, what was measured until then counts"
  [ "$most" -ge 5 ] || outcome="left out, no time"
  local words="${*//\{\}/.}"
  echo "| $name | $((SECONDS - start)) | $outcome | \`${words/#$python/python}\` |" | tee -a "$output/README.md"
}

if [ -n "$small" ]; then
  layer=(--experts 8 --model-dim 64 --hidden-dim 128 --tokens 64 128 --seconds 0.3)
  few=(--experts 8 --model-dim 64 --hidden-dim 128 --tokens 64 --seconds 0.3)
  model=(--layers 4 --model-dim 16 --hidden-dim 32 --experts 8 --vocabulary 99 --batch 2 --max-batch 4 --steps 3
    --source-length 6 --buffer-size 3)
  tiles=(--experts 4 --model-dim 32 --hidden-dim 48 --tokens 16 --most 2)
  command=(--models mt --quick)
else
  layer=(--tokens 64 256 1024 8192 2048 16384 --seconds 2)
  few=(--tokens 64 256 1024 8192 --seconds 1.5)
  model=(--batch 16 --seconds 25)
  tiles=(--tokens 256 1024 8192)
  command=(--models mt --model-dim 512 --repetitions 1 --variants static dynamic dense)
fi
graph=(--cuda-graph)
[ "$device" = cuda ] || { graph=() && export TRITON_INTERPRET=1; }
half=(--device "$device" --dtype float16) brain=(--device "$device" --dtype bfloat16)

# without fairseq the models' tests are errors, and the layers' still run
step tests 90 "$python" -m pytest -q -m gpu --continue-on-collection-errors tests/experts/test_device_experts.py \
  tests/buffering/test_gpu.py tests/serving/test_kernels.py
step layer-nllb-54b-float16 90 "$python" scripts/benchmarks/benchmark_layer.py --shape nllb-54b "${half[@]}" "${layer[@]}" \
  --kernel auto loop ${graph[@]+"${graph[@]}"} --output {}/layer-nllb-54b-float16.json
step layer-lm-52b-float16 80 "$python" scripts/benchmarks/benchmark_layer.py --shape lm-52b "${half[@]}" "${layer[@]}" \
  --kernel auto loop ${graph[@]+"${graph[@]}"} --output {}/layer-lm-52b-float16.json
step random-model 150 "$python" scripts/benchmarks/benchmark_random_model.py "${half[@]}" "${model[@]}" --output {}/random-model.json
step layer-nllb-54b-bfloat16 60 "$python" scripts/benchmarks/benchmark_layer.py --shape nllb-54b "${brain[@]}" "${few[@]}" \
  --kernel auto grouped-mm ${graph[@]+"${graph[@]}"} --output {}/layer-nllb-54b-bfloat16.json
step tiles-nllb-54b 60 "$python" scripts/benchmarks/tune_tiles.py --shape nllb-54b "${half[@]}" "${tiles[@]}" \
  --output {}/tiles-nllb-54b.json
step layer-lm-52b-bfloat16 50 "$python" scripts/benchmarks/benchmark_layer.py --shape lm-52b "${brain[@]}" "${few[@]}" \
  --kernel auto grouped-mm ${graph[@]+"${graph[@]}"} --output {}/layer-lm-52b-bfloat16.json
step commands 100 "$python" scripts/benchmarks/benchmark_generate.py "${half[@]}" "${command[@]}" --output {}/commands
echo "$SECONDS s; results in $output"
exit $failure
