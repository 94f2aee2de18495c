#!/usr/bin/env bash
# Runs the benchmarks of models one after the other and keeps what each says.
#
#   benchmarks/run_all.sh [--device=cpu|gpu] [--size=small|real] [--results=FOLDER]
#
# small is a model of 47 million parameters and takes about half an hour on two CPU cores; real is Qwen2-VL-2B
# and 7B in bfloat16 on a GPU. A file for each run goes to FOLDER (default benchmark_results/DATE-DEVICE-SIZE) and begins
# with its command, the date, hardware and versions. PYTHON names the interpreter. Ends with 1 if a run failed, and says
# which.
set -euo pipefail
cd "$(dirname "$0")/.."

device=cpu size=small results=
for argument; do
  case $argument in
    --device=cpu | --device=gpu) device=${argument#*=} ;;
    --size=small | --size=real | --size=tiny) size=${argument#*=} ;;
    --results=?*) results=${argument#*=} ;;
    *)
      echo "unknown argument $argument: --device=cpu|gpu, --size=small|real, --results=FOLDER" >&2
      exit 2
      ;;
  esac
done
if [[ $size == real && $device == cpu ]]; then
  echo "--size=real needs --device=gpu: on a CPU a pair of these sizes takes minutes" >&2
  exit 2
fi
python=${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}
results=${results:-benchmark_results/$(date +%Y-%m-%d)-$device-$size}
mkdir -p "$results"
failed=()

# run NAME SCRIPT [FLAG ...]
run() {
  local name=$1 script=$2
  shift 2
  echo "== $name"
  if ! "$python" "benchmarks/$script.py" "--device=$device" "$@" 2>&1 | tee "$results/$name.txt"; then
    failed+=("$name")
  fi
  echo
}

if [[ $size == real ]]; then
  for model in 2b 7b; do
    run "scoring-$model" scoring "--size=$model"
    run "embedding-$model" embedding "--size=$model"
  done
  # As many pairs as 80 GB should hold; both sides at once only where adapters learn.
  run training-lora-2b training --size=2b --parts lora --pairs=6
  run training-2b training --size=2b --pairs=12 --remat=dots --alone
  run training-lora-7b training --size=7b --parts lora --pairs=6 --remat=dots --alone
  run startup-2b startup --size=2b --repeats=1
else
  run scoring scoring "--size=$size"
  run training training "--size=$size"
  run training-lora training "--size=$size" --parts lora
  run embedding embedding "--size=$size"
  run startup startup "--size=$size"
fi
if [[ $size == small ]]; then
  run throughput throughput "--size=$size" "--plot=$results/throughput.png"
  run long_context long_context "--plot=$results/long_context.png"
elif [[ $size == tiny ]]; then
  run throughput throughput "--size=$size" --images=2 --texts=1,2 --words=10,20 "--plot=$results/throughput.png"
  run long_context long_context --lengths=256,512 --dense=256 "--plot=$results/long_context.png"
fi
echo "results: $results"
if ((${#failed[@]})); then
  echo "failed: ${failed[*]}" >&2
  exit 1
fi
