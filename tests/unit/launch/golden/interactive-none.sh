#!/bin/bash
set -eo pipefail
module load cuda
set -u

export NCCL_DEBUG=WARN
export NOTE='it'"'"'s "quoted" $HOME'

command=(
  fairseq-train '/data/my text'
  --user-dir fairseq_moe
  --adam-betas '(0.9, 0.98)'
)

missing=
for name in NODE_RANK MASTER_ADDR MASTER_PORT; do
  [[ -n "${!name:-}" ]] || missing+=" $name"
done
if [[ -n "$missing" ]]; then
  echo "not set:$missing. On each node set NODE_RANK (0 on the first), MASTER_ADDR and MASTER_PORT of the first." >&2
  exit 2
fi
rendezvous=(--node-rank="$NODE_RANK" --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT")

exec torchrun --nnodes=2 --nproc-per-node=4 "${rendezvous[@]}" --shutdown-timeout=600 --no-python \
  "${command[@]}"
