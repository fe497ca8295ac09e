#!/usr/bin/env bash
# Full-parameter training on all GPUs of one node, or of several that run this same line with the same HEAD.
#
#   bash scripts/cluster/torchrun.sh RECIPE [KEY.SUB=VALUE …]
#   NODES=2 HEAD=node-0:29500 bash scripts/cluster/torchrun.sh RECIPE [KEY.SUB=VALUE …]      # on each of the nodes
#
# A rank that fails ends the others; torchrun starts them again, and they go on from the last checkpoint by themselves.
set -euo pipefail
# PyTorch 2.13 gives ranks that were started again the store of those before them, with their old addresses in it.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec torchrun \
    --nnodes "${NODES:-1}" --nproc-per-node "${GPUS:-gpu}" \
    --rdzv-backend c10d --rdzv-endpoint "${HEAD:-localhost:0}" --rdzv-id "${RUN_ID:-qorpo}" \
    --max-restarts "${RESTARTS:-3}" \
    -m qorpo train "$@" --full
