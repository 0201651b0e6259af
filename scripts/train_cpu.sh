#!/bin/bash
# Train a small MoE language model on CPU over gloo, on synthetic data (--task dummy_lm): to try flags, or to
# measure a change, without a GPU.
#
#   scripts/train_cpu.sh                                 two ranks, 50 updates
#   RANKS=4 scripts/train_cpu.sh --moe-top1-expert       later flags override earlier ones
#   DATA=data-bin scripts/train_cpu.sh                   train on fairseq-preprocess output instead
#   DRY_RUN=1 scripts/train_cpu.sh                       print the command only
#
# RANKS (default 2) and NUM_EXPERTS (default 4): one of the two must be a multiple of the other.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

RANKS=${RANKS:-2}
NUM_EXPERTS=${NUM_EXPERTS:-4}
# A thread per core and process would make two ranks on two cores many times slower.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
if [[ -n "${DATA:-}" ]]; then
  TASK=("$DATA" --task language_modeling)
else
  TASK=(--task dummy_lm --dict-size 1000 --dataset-size 1000 --disable-validation)
fi

run fairseq-train --user-dir "$USER_DIR" \
  --cpu --distributed-world-size "$RANKS" --ddp-backend legacy_ddp \
  "${TASK[@]}" --tokens-per-sample 128 \
  --arch transformer_lm_gpt --share-decoder-input-output-embed \
  --decoder-layers 4 --decoder-embed-dim 128 --decoder-ffn-embed-dim 512 \
  --decoder-attention-heads 4 \
  --moe-expert-count "$NUM_EXPERTS" --moe-freq 2 \
  --moe-gating-use-fp32 --moe-second-expert-policy all \
  --criterion moe_cross_entropy --moe-gate-loss-wt 0.01 --moe-gate-loss-combine-method sum \
  --optimizer adam --adam-betas '(0.9, 0.98)' --clip-norm 1.0 \
  --lr 0.002 --warmup-updates 20 \
  --dropout 0.0 --attention-dropout 0.0 \
  --batch-size 4 --update-freq 1 \
  --max-update 50 --no-save \
  --log-format json --log-interval 10 \
  "$@"
