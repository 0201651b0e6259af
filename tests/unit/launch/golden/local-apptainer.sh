#!/bin/bash
set -eo pipefail
module load cuda
set -u

export OMP_NUM_THREADS=1
export NCCL_DEBUG=WARN
export NOTE='it'"'"'s "quoted" $HOME'
export APPTAINERENV_OMP_NUM_THREADS=1
export APPTAINERENV_NCCL_DEBUG=WARN
export APPTAINERENV_NOTE='it'"'"'s "quoted" $HOME'

command=(
  fairseq-train '/data/my text'
  --user-dir fairseq_moe
  --adam-betas '(0.9, 0.98)'
)

exec apptainer exec --no-home --bind /outside:/in --bind /runs/tiny:/runs/tiny --pwd /in/work image \
  torchrun --nnodes=1 --nproc-per-node=2 --standalone --shutdown-timeout=600 --no-python \
  "${command[@]}"
