#!/usr/bin/env bash
# vcore train on all GPUs of one machine, or of several. Start it on each machine with the same
# HEAD, the name of one of them, and the options of vcore train:
#   HEAD=node0 NODES=2 examples/launch/torchrun.sh --config examples/launch/run.yaml
# A second call after a kill, with --resume, goes on from the newest checkpoint.
set -euo pipefail

exec torchrun \
  --nnodes "${NODES:-1}" \
  --nproc-per-node "${GPUS:-gpu}" \
  --rdzv-backend c10d \
  --rdzv-endpoint "${HEAD:-localhost}:${PORT:-29400}" \
  --rdzv-id "${RUN_ID:-vcore}" \
  -m vcore_train.cli train "$@"
