#!/usr/bin/env bash
# Runs a module on every worker of a TPU VM, in an environment made there:
#   TPU=my-tpu ZONE=us-west4-a launch/tpu.sh launch.scans --config=configs/scans/llama2_7b_chat.py --out=/mnt/runs/llama2
# --out and a model folder must be on a disk that all workers mount; a hub name is fetched by each of them.
set -euo pipefail
: "${TPU:?name of the TPU VM}" "${ZONE:?its zone}" "${1:?module to run, such as launch.scans}"
printf -v arguments '%q ' "$@"
cd "$(dirname "$0")/.."

worker() { gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="$1"; }

tar --exclude=.git --exclude=runs --exclude='.venv*' -czf "${TMPDIR:-/tmp}/jaxsafe.tgz" .
gcloud compute tpus tpu-vm scp "${TMPDIR:-/tmp}/jaxsafe.tgz" "$TPU": --zone="$ZONE" --worker=all
worker "
  set -e
  mkdir -p jaxsafe && tar -xzf jaxsafe.tgz -C jaxsafe && cd jaxsafe
  python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo 'Python 3.11 or newer is needed'; exit 1; }
  test -d .venv || python3 -m venv .venv
  .venv/bin/pip install --quiet -r requirements-tpu.txt"
# Every worker runs the same program, or the first one waits for the others for ever.
worker "cd jaxsafe && HF_TOKEN='${HF_TOKEN:-}' .venv/bin/python -m $arguments --distributed"
