#!/bin/bash
set -eo pipefail
module load cuda
set -u

export OMP_NUM_THREADS=1
export NCCL_DEBUG=WARN
export NOTE='it'"'"'s "quoted" $HOME'

command=(
  fairseq-train '/data/my text'
  --user-dir fairseq_moe
  --adam-betas '(0.9, 0.98)'
)

exec docker run --rm --init --network=host --ipc=host --ulimit=memlock=-1 --volume /outside:/in --volume /runs/tiny:/runs/tiny --workdir /in/work --env OMP_NUM_THREADS --env NCCL_DEBUG --env NOTE --env WANDB_API_KEY --user "$(id -u):$(id -g)" --env USER --env HOME=/tmp image \
  torchrun --nnodes=1 --nproc-per-node=2 --standalone --shutdown-timeout=600 --no-python \
  "${command[@]}"
