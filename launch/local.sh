#!/usr/bin/env bash
# Runs a verb in N processes on this machine; each gets its share of the GPUs, on a CPU they talk over Gloo.
#
#   launch/local.sh 2 train --config=configs/lora.py --workdir=runs/two ...     (train may be left out)
#
# When one fails the others are ended, and its exit code is that of the script, not that of those that only lost it (76
# or 134); what several say in the end is said once, with who they are. Ctrl-C and SIGTERM reach all of them.
# MULTITAP names the program (default: multitap), MULTITAP_PORT the port of process 0 (default: a free one).
set -euo pipefail
GRACE=10 # seconds in which the others may end on their own, with what they have to say

count=${1:-}
if ! [[ $count =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: launch/local.sh N [VERB] [--flag=value ...]     N processes of multitap VERB (train) here" >&2
  exit 2
fi
shift
if [[ ${1:---} == --* ]]; then set -- train "$@"; fi
if [[ -z ${MULTITAP:-} ]] && ! command -v multitap >/dev/null; then
  MULTITAP=$(dirname "$0")/../.venv/bin/multitap
fi
read -ra program <<<"${MULTITAP:-multitap}"

taken() { (: <"/dev/tcp/localhost/$1") 2>/dev/null; }
port=${MULTITAP_PORT:-$((20000 + RANDOM % 10000))}
while [[ -z ${MULTITAP_PORT:-} ]] && taken "$port"; do port=$((20000 + RANDOM % 10000)); done
export MULTITAP_COORDINATOR=localhost:$port MULTITAP_NUM_PROCESSES=$count

gpus=()
if [[ ${JAX_PLATFORMS:-} != cpu ]] && command -v nvidia-smi >/dev/null; then
  IFS=, read -ra gpus <<<"${CUDA_VISIBLE_DEVICES:-$(nvidia-smi --query-gpu=index --format=csv,noheader | paste -sd, -)}"
fi
each=$((${#gpus[@]} / count))
if ((${#gpus[@]} > 0 && each == 0)); then
  echo "launch/local.sh: $count processes, but ${#gpus[@]} GPUs; a process needs one of its own" >&2
  exit 2
fi

said=$(mktemp -d)
trap 'rm -rf "$said"' EXIT
pids=()
for ((index = 0; index < count; index++)); do
  (
    export MULTITAP_PROCESS_ID=$index MULTITAP_LAST_WORDS=$said/$index
    if ((each > 0)); then
      CUDA_VISIBLE_DEVICES=$(IFS=, && echo "${gpus[*]:index*each:each}")
      export CUDA_VISIBLE_DEVICES
    fi
    exec "${program[@]}" "$@"
  ) &
  pids+=("$!")
done
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT

code=0 deadline='' killed=''
while ((${#pids[@]} > 0)); do
  running=()
  for pid in "${pids[@]}"; do
    if kill -0 "$pid" 2>/dev/null; then
      running+=("$pid")
      continue
    fi
    ended=0
    wait "$pid" || ended=$?
    if ((ended == 0)); then continue; fi
    if [[ -z $killed ]] && ((code == 0 || ((code == 76 || code == 134) && ended != 76 && ended != 134))); then
      code=$ended
      echo "launch/local.sh: a process ended with code $ended" >&2
    fi
    if [[ -z $deadline ]] && ((ended != 143)); then # 143: all have saved and end together
      deadline=$((SECONDS + GRACE))
    fi
  done
  pids=(${running[@]+"${running[@]}"})
  if [[ -n $deadline ]] && ((SECONDS >= deadline && ${#pids[@]} > 0)); then
    killed=yes
    kill -KILL "${pids[@]}" 2>/dev/null || true
  fi
  if ((${#pids[@]} > 0)); then sleep 0.2; fi
done

words=() who=()
for ((index = 0; index < count; index++)); do
  if ! [[ -s $said/$index ]]; then continue; fi
  text=$(<"$said/$index")
  text=${text//process $index of $count/this process}
  for ((same = 0; same < ${#words[@]}; same++)); do
    if [[ ${words[same]} == "$text" ]]; then break; fi
  done
  words[same]=$text
  who[same]="${who[same]:-}${who[same]:+, }$index"
done
for ((same = 0; same < ${#words[@]}; same++)); do
  printf 'process %s of %s:\n%s\n' "${who[same]}" "$count" "${words[same]}" >&2
done
exit "$code"
