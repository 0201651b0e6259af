"""Load models to evaluate or to use: what their task must know of them, and where their experts are."""

import inspect
from collections.abc import Callable
from typing import Any

from omegaconf import OmegaConf, open_dict

from fairseq_moe.criterions.moe_cross_entropy import MoECrossEntropyCriterionConfig
from fairseq_moe.distributed import local_experts_only
from fairseq_moe.stock.evaluation.lengths import count_validated, settle_length
from fairseq_moe.stock.evaluation.request import current_request
from fairseq_moe.stock.find_experts import moe_decoder
from fairseq_moe.stock.seam import seam


@seam(
    "fairseq.checkpoint_utils:load_model_ensemble_and_task",
    signature="(filenames, arg_overrides, task, strict, suffix, num_shards, state)",
    stock_does="returns models and task, which know nothing of each other",
    breaks="the task cuts blocks that are longer than the model's positions, and then leaves them out",
    we_do="note on the task whether a model has experts; settle the length of its blocks",
    test="tests/e2e/test_evaluation_length.py",
)
def load_model_ensemble_and_task(stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    models, cfg, task = stock(*args, **kwargs)
    task.evaluates_experts = any(moe_decoder(model) is not None for model in models)
    request = current_request()
    if request is None:
        return models, cfg, task
    request.has_experts |= task.evaluates_experts
    if request.scores and task.evaluates_experts:
        overrides = inspect.signature(stock).bind(*args, **kwargs).arguments.get("arg_overrides") or {}
        settle_length(request, task, models, overrides)
    if request.command == "validate":
        if task.evaluates_experts:
            count_validated(request, task)
        if cfg.criterion is None:
            _name_criterion(cfg)
    return models, cfg, task


def _name_criterion(cfg: Any) -> None:
    """Put the criterion of MoE models into a configuration that no training has made."""
    with open_dict(cfg):
        cfg.criterion = OmegaConf.structured(MoECrossEntropyCriterionConfig)
        cfg.criterion._name = "moe_cross_entropy"


@seam(
    "fairseq.hub_utils:from_pretrained",
    signature="(model_name_or_path, checkpoint_file, data_name_or_path, archive_map, **kwargs)",
    stock_does="loads a model for use in this process",
    breaks="inside a process group the experts would be spread over ranks that do not call the model",
    we_do="all experts in this process",
    test="tests/e2e/test_commands.py",
)
def from_pretrained(stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with local_experts_only():
        return stock(*args, **kwargs)
