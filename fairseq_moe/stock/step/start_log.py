"""What a run with experts logs when it starts: its sizes, and what some flags come to."""

import logging
from typing import Any

import torch
from torch import nn

from fairseq_moe.criterions import MoECrossEntropyCriterion
from fairseq_moe.flags.megatron_aliases import argument_warnings
from fairseq_moe.flags.parallel_checks import parallel_notes
from fairseq_moe.flags.pipeline_checks import pipeline_notes
from fairseq_moe.flags.sharding import ShardingConfig, sharding_notes
from fairseq_moe.models.decoder import MoEDecoder
from fairseq_moe.models.sizes import counted_here, whole_size
from fairseq_moe.modules.kernels.fp8 import fp8_note
from fairseq_moe.parallel.placement import is_expert

__all__ = ["log_sizes", "warn_once"]

logger = logging.getLogger(__name__)


def log_sizes(model: nn.Module, decoder: MoEDecoder) -> None:
    """Log how many parameters a whole model has, in the branch's words and in ours; of experts, this rank's own.

    Collective over the stages of a pipeline.
    """
    counted, numbers = list(counted_here(model.parameters(), decoder.mesh)), []
    for of_experts in (False, True):
        sized = [
            (whole_size(p, decoder.mesh), p.requires_grad) for p in counted if is_expert(p) is of_experts
        ]
        numbers += [sum(size for size, _ in sized), sum(size for size, trained in sized if trained)]
    sums = decoder.stage.sums(numbers)
    for label, total, trained in (("non-expert", *sums[:2]), ("expert", *sums[2:])):
        logger.info("num. %s model params: %s (num. trained: %s)", label, f"{total:,}", f"{trained:,}")
    logger.info("%s", decoder.size)


def warn_once(cfg: Any, decoder: MoEDecoder, criterion: nn.Module) -> None:
    """Log what flags come to in this run; for one rank."""
    for sentence in (*argument_warnings(cfg.model), *parallel_notes(cfg.model), *pipeline_notes(cfg)):
        logger.warning(sentence)
    for sentence in sharding_notes(cfg, on_gpu=torch.cuda.is_available() and not cfg.common.cpu):
        logger.warning(sentence)
    if not isinstance(criterion, MoECrossEntropyCriterion):
        logger.warning(
            "the criterion %s does not add the gate loss, so nothing balances the experts; use --criterion "
            "moe_cross_entropy.",
            type(criterion).__name__,
        )
    if decoder.moe.fp8 is not None:
        expert_dim = decoder.moe.expert_dim or cfg.model.decoder_ffn_embed_dim
        logger.info(fp8_note(decoder.moe.fp8, cfg.model.decoder_embed_dim, expert_dim))
    shards_parameters = str(cfg.distributed_training.ddp_backend) == "fully_sharded"
    shards_parameters |= ShardingConfig.from_args(cfg.model).use_torch_fsdp2
    if decoder.moe.moe_normalize_expert_grad == "sqrt_world_size" and not shards_parameters:
        logger.warning(
            "--moe-normalize-expert-grad sqrt_world_size takes effect under --ddp-backend fully_sharded and "
            "--use-torch-fsdp2 only; here expert gradients are divided by the world size."
        )
