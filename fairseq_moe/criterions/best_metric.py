"""Refuse a --best-checkpoint-metric that validation will not log, before anything is trained.

Stock looks it up after the first validation, which may be hours later, and ends in a KeyError.
"""

from typing import Any

from fairseq.tasks import TASK_REGISTRY, FairseqTask

from fairseq_moe.criterions.moe_cross_entropy import LOGGED_METRICS
from fairseq_moe.criterions.per_layer import per_layer_names
from fairseq_moe.flags.moe import MoEConfig
from fairseq_moe.flags.records import getter

__all__ = ["best_metric_problems", "validation_metrics"]

# Logged with every criterion; rarely what one wants to choose by.
_ALWAYS = ("bsz", "num_updates", "wpb", "wps")


def best_metric_problems(cfg: Any) -> list[str]:
    """List one sentence if a run of an MoE model chooses its best checkpoint by a metric that there is not.

    Args:
        cfg: a whole fairseq configuration.
    """
    if getattr(cfg, "model", None) is None or not MoEConfig.from_args(cfg.model).enabled:
        return []
    wanted = cfg.checkpoint.best_checkpoint_metric
    names = None if cfg.dataset.disable_validation else validation_metrics(cfg)
    if names is None or wanted in names or wanted in _ALWAYS:
        return []
    shown = [name for name in names if not name.startswith("layer")]
    if len(shown) < len(names):
        shown.append("those of the layers (--moe-per-layer-logging)")
    return [
        f"--best-checkpoint-metric is {wanted}, which validation with --criterion {getter(cfg.criterion)('_name')} "
        f"does not log; choose one of {', '.join(shown)}."
    ]


def validation_metrics(cfg: Any) -> list[str] | None:
    """Name the metrics that validation of a model with experts logs; None where nobody can know.

    Only criterions whose code we know are answered for, and tasks that add nothing to what the criterion logs.
    """
    task = TASK_REGISTRY.get(getter(cfg.task)("_name"))
    if task is None or not _adds_no_metrics(task):
        return None
    get = getter(cfg.criterion)
    # By tokens: not logged, because it is the loss. By sentences: the two differ.
    by_token = ["nll_loss"] if get("sentence_avg") else []
    if get("_name") == "cross_entropy":
        return ["loss", *by_token, "ppl"]
    if get("_name") == "label_smoothed_cross_entropy":
        return ["loss", "nll_loss", "ppl", *(("accuracy",) if get("report_accuracy") else ())]
    if get("_name") != "moe_cross_entropy":
        return None
    names = [*LOGGED_METRICS, *by_token]
    moe = MoEConfig.from_args(cfg.model)
    if moe.moe_per_layer_logging:
        try:
            layers = [index for index in range(moe.decoder_layers) if moe.is_moe_layer(index)]
        except ValueError:  # a pattern that is refused by itself
            return None
        names += per_layer_names(layers, moe.num_experts)
    return names


def _adds_no_metrics(task: type[Any]) -> bool:
    own = ("reduce_metrics", "aggregate_logging_outputs", "valid_step")
    inherits = all(getattr(task, name) is getattr(FairseqTask, name) for name in own)
    return inherits and not hasattr(task, "post_validate")
