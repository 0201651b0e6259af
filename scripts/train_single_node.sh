#!/bin/bash
# Benchmark a 4.1B-parameter MoE language model on one node of 8 GPUs, on synthetic data (--task dummy_lm): the
# single-node command of the README of fairseq's moe branch, plus --user-dir.
#
#   scripts/train_single_node.sh                               as it is
#   scripts/train_single_node.sh --batch-size 2 --max-update 50  later flags override earlier ones
#   DATA=data-bin scripts/train_single_node.sh                 train on fairseq-preprocess output instead
#   DRY_RUN=1 scripts/train_single_node.sh                     print the command only
#
# NUM_EXPERTS (default 8) is best the number of GPUs, one expert each; TOKENS_PER_SAMPLE (default 2048).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

NUM_EXPERTS=${NUM_EXPERTS:-8}
TOKENS_PER_SAMPLE=${TOKENS_PER_SAMPLE:-2048}
if [[ -n "${DATA:-}" ]]; then
  TASK=("$DATA" --task language_modeling)
else
  TASK=(--task dummy_lm)
fi

run fairseq-train --user-dir "$USER_DIR" \
  --ddp-backend fully_sharded --memory-efficient-fp16 --checkpoint-activations \
  "${TASK[@]}" --tokens-per-sample "$TOKENS_PER_SAMPLE" \
  --arch transformer_lm_gpt --share-decoder-input-output-embed \
  --decoder-layers 24 --decoder-embed-dim 2048 --decoder-ffn-embed-dim 8192 \
  --decoder-attention-heads 32 \
  --moe-expert-count "$NUM_EXPERTS" --moe-freq 2 \
  --moe-gating-use-fp32 --moe-second-expert-policy all \
  --moe-normalize-expert-grad sqrt_world_size \
  --moe-eval-capacity-token-fraction -1.0 \
  --max-sentences-valid 1 --num-workers-valid 0 \
  --criterion moe_cross_entropy --moe-gate-loss-wt 0.01 --moe-gate-loss-combine-method sum \
  --optimizer adam --fp16-adam-stats --adam-betas '(0.9, 0.98)' --clip-norm 0.0 \
  --lr 0.0005 --warmup-updates 750 \
  --dropout 0.1 --attention-dropout 0.1 \
  --batch-size 4 --update-freq 1 \
  --max-update 250 --disable-validation \
  --log-format json --log-interval 10 \
  "$@"
