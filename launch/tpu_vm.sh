#!/usr/bin/env bash
# A run on all hosts of a Cloud TPU VM or pod slice, started from anywhere that has gcloud.
#
#   launch/tpu_vm.sh NAME ZONE train --config=configs/official.py --workdir=/mnt/run ...     (train may be left out)
#
# The hosts have the project in MULTITAP_FOLDER (default: multitap_jax, in the home folder) with its .venv made by
# `pip install -e '.[tpu]'`, and share the folder of --workdir. A host that fails ends the others; start it again then.
set -euo pipefail

if (($# < 2)) || [[ $1 == -* || $2 == -* ]]; then
  echo "usage: launch/tpu_vm.sh NAME ZONE [VERB] [--flag=value ...]     multitap VERB (train) on all hosts of NAME" >&2
  exit 2
fi
name=$1 zone=$2
shift 2
if [[ ${1:---} == --* ]]; then set -- train "$@"; fi

folder=${MULTITAP_FOLDER:-multitap_jax}
command=$(printf '%q ' "$@")
exec gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all \
  --command="cd $(printf '%q' "$folder") && MULTITAP_COORDINATOR=auto .venv/bin/multitap ${command% }"
