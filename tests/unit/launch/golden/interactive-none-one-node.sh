#!/bin/bash
set -eo pipefail
set -u

export NCCL_DEBUG=WARN
export NOTE='it'"'"'s "quoted" $HOME'

command=(
  fairseq-train '/data/my text'
  --user-dir fairseq_moe
  --adam-betas '(0.9, 0.98)'
)

rendezvous=(--standalone)
if [[ -n "${MASTER_PORT:-}" ]]; then
  rendezvous=(--master-addr="${MASTER_ADDR:-127.0.0.1}" --master-port="$MASTER_PORT")
fi

exec torchrun --nnodes=1 --nproc-per-node=4 "${rendezvous[@]}" --shutdown-timeout=600 --no-python \
  "${command[@]}"
