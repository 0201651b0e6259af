"""Compare the flags of two starts of one run: what changed since the checkpoint, and which change is refused.

A flag that a user changes on resume either acts as stock documents it, or the run ends with a sentence that
names both values and the flag that allows the change. ``docs/reliability.md`` prints ``RESUME_RULES`` as a table.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from enum import Enum, StrEnum
from typing import Any

from fairseq_moe.flags.records import getter
from fairseq_moe.models.moe_transformer_lm import MoETransformerLanguageModelConfig

__all__ = [
    "RESUME_RULES",
    "Resets",
    "ResumeRule",
    "Until",
    "class_changes",
    "data_changes",
    "group_changes",
    "model_changes",
    "state_changes",
]

_ABSENT = object()
# Stock repeats flags of other groups among those of its model.
_NOT_OF_THE_MODEL = {
    "add_bos_token", "batch_size", "ddp_backend", "distributed_rank", "fp16", "fp16_no_flatten_grads",
    "max_target_positions", "memory_efficient_fp16", "num_workers_valid", "tokens_per_sample", "tpu", "world_size",
    "use_moe_pad_mask",  # ``keep_padding_mask`` decides about it, and says so
}  # fmt: skip


class Until(StrEnum):
    """Name the part of a checkpoint that a changed flag would falsify by the reset that allows the change."""

    OPTIMIZER = "--reset-optimizer"
    SCHEDULER = "--reset-lr-scheduler"
    DATA = "--reset-dataloader"


@dataclass(frozen=True, kw_only=True)
class ResumeRule:
    """Record what happens when a stock flag has another value than in the checkpoint.

    Args:
        flag: as typed.
        group: group of the fairseq configuration that holds it; empty for a rule that is described only.
        field: its name there.
        until: refused unless this reset is asked for; None: the change is honoured.
        text: what a reader of the docs must know.
        test: shows it.
    """

    flag: str
    group: str = ""
    field: str = ""
    until: Until | None = None
    text: str
    test: str = "tests/reliability/test_resume_changes.py"


def _refused(flag: str, until: Until, text: str, *, group: str, field: str = "") -> ResumeRule:
    name = field or flag.removeprefix("--").replace("-", "_")
    return ResumeRule(flag=flag, group=group, field=name, until=until, text=text)


_PLACE = (
    "in the middle of an epoch: the place in the data would be another; between epochs the change is honoured"
)

RESUME_RULES = (
    _refused(
        "--optimizer", Until.OPTIMIZER, "its state is of another kind", group="optimizer", field="_name"
    ),
    ResumeRule(
        flag="--fp16, --memory-efficient-fp16, --bf16, --memory-efficient-bf16",
        until=Until.OPTIMIZER,
        text="where the optimizer keeps its state otherwise (fp16 and bf16 share a form, so do the two "
        "memory-efficient ones)",
    ),
    ResumeRule(flag="--fp16-adam-stats", text="honoured: the moments are converted"),
    ResumeRule(
        flag="--adam-betas, --adam-eps, --weight-decay, ...",
        until=Until.OPTIMIZER,
        text="stock keeps the checkpoint's values in silence; --optimizer-overrides names the new ones",
    ),
    ResumeRule(
        flag="--lr, --warmup-updates, ...", text="honoured: the schedule is computed from this run's flags"
    ),
    _refused(
        "--lr-scheduler", Until.SCHEDULER, "its state is of another kind", group="lr_scheduler", field="_name"
    ),
    ResumeRule(
        flag="--criterion", until=Until.OPTIMIZER, text="the optimizer's moments are those of another loss"
    ),
    _refused("--task", Until.DATA, _PLACE, group="task", field="_name"),
    _refused("--batch-size", Until.DATA, _PLACE, group="dataset"),
    _refused("--max-tokens", Until.DATA, _PLACE, group="dataset"),
    _refused("--required-batch-size-multiple", Until.DATA, _PLACE, group="dataset"),
    _refused("--train-subset", Until.DATA, _PLACE, group="dataset"),
    _refused("--tokens-per-sample", Until.DATA, _PLACE, group="task"),
    _refused("--sample-break-mode", Until.DATA, _PLACE, group="task"),
    _refused("--shorten-method", Until.DATA, _PLACE, group="task"),
    _refused("--seed", Until.DATA, _PLACE, group="common"),
    ResumeRule(flag="--update-freq, --clip-norm", text="honoured"),
    ResumeRule(
        flag="--ddp-backend, --distributed-world-size",
        text="honoured: state is kept by name and cut anew",
        test="tests/reliability/test_r07_other_layouts.py",
    ),
    ResumeRule(
        flag="--decoder-layers and all that shapes the model",
        text="refused with both values",
        test="tests/reliability/test_r08_other_models.py",
    ),
    ResumeRule(
        flag="--dropout, --rope-theta, --moe-fp8 and all else of the model",
        text="honoured; one line of the log names each flag that differs with both values",
    ),
    ResumeRule(
        flag="the dictionary (dict.txt)",
        text="refused, by every command that loads a model: token ids would mean other words",
    ),
    ResumeRule(
        flag="--no-save-optimizer-state",
        text="a checkpoint without optimizer state goes on with its update count and schedule; a warning says "
        "that the moments begin afresh",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Resets:
    """Record the parts of a checkpoint that this start leaves behind.

    Args:
        optimizer: ``--reset-optimizer``; the schedule is left behind with it.
        scheduler: ``--reset-lr-scheduler``.
        data: ``--reset-dataloader``.
    """

    optimizer: bool = False
    scheduler: bool = False
    data: bool = False


def state_changes(saved: Any, wanted: Any, *, resets: Resets, has_optimizer: bool = True) -> list[str]:
    """List changes of optimizer and schedule that the checkpoint's state does not survive, a phrase each.

    Args:
        saved: the checkpoint's whole configuration, a mapping or a namespace; of older files parts are missing.
        wanted: this run's.
        resets: what is left behind anyway.
        has_optimizer: the checkpoint holds optimizer state.
    """
    if resets.optimizer:
        return []
    found = list(_changes(saved, wanted, Until.OPTIMIZER)) if has_optimizer else []
    return found if resets.scheduler else [*found, *_changes(saved, wanted, Until.SCHEDULER)]


def data_changes(saved: Any, wanted: Any, *, batches_done: int, resets: Resets) -> list[str]:
    """List changes that move the place in the data, a phrase each.

    Args:
        saved: the checkpoint's whole configuration.
        wanted: this run's.
        batches_done: of the epoch that the checkpoint is in; between epochs any change is honoured.
        resets: what is left behind anyway.
    """
    if resets.data or batches_done == 0:
        return []
    return list(_changes(saved, wanted, Until.DATA))


def _changes(saved: Any, wanted: Any, until: Until) -> Iterator[str]:
    for rule in RESUME_RULES:
        if rule.until is not until or not rule.group:
            continue
        old, new = (_value(getter(cfg)(rule.group), rule.field) for cfg in (saved, wanted))
        if old is not _ABSENT and new is not _ABSENT and old != new:
            yield f"{rule.flag} is {old} in the checkpoint and {new} in this run (pass {until} to change it)"


def _value(section: Any, field: str) -> Any:
    """Read one value of a configuration's group as text; ``_ABSENT`` where it does not know it."""
    if section is None:
        return _ABSENT
    known = field in section if isinstance(section, Mapping) else hasattr(section, field)
    if not known:
        return _ABSENT
    value = getter(section)(field)
    return str(value.value if isinstance(value, Enum) else value)


def class_changes(last: Mapping[str, Any], trainer: Any, saved_cfg: Any) -> list[str]:
    """List what kind of criterion or optimizer the state was written by, where this trainer has another.

    Args:
        last: the checkpoint's last entry of stock's optimizer history.
        trainer: its optimizer is built.
        saved_cfg: the checkpoint's whole configuration.
    """
    found, allowed = [], f"(pass {Until.OPTIMIZER} to change it)"
    criterion = type(trainer.get_criterion()).__name__
    if last["criterion_name"] != criterion:
        found.append(
            f"--criterion is {last['criterion_name']} in the checkpoint and {criterion} in this run {allowed}"
        )
    optimizer = type(trainer.optimizer).__name__
    if last["optimizer_name"] != optimizer:
        old = f"{precision_of(saved_cfg)} ({last['optimizer_name']})"
        new = f"{precision_of(trainer.cfg)} ({optimizer})"
        found.append(f"precision is {old} in the checkpoint and {new} in this run {allowed}")
    return found


_PRECISIONS = ("memory_efficient_fp16", "memory_efficient_bf16", "fp16", "bf16")


def precision_of(cfg: Any) -> str:
    """Name the precision that a configuration trains in, as typed; fp32 has no flag."""
    given = [name for name in _PRECISIONS if _value(getter(cfg)("common"), name) == "True"]
    backend = _value(getter(cfg)("distributed_training"), "ddp_backend")
    named = "--" + given[0].replace("_", "-") if given else "fp32"
    return f"{named} under {backend}" if backend == "fully_sharded" else named


def group_changes(saved: list[dict[str, Any]], own: list[dict[str, Any]], overrides: Any) -> list[str]:
    """List hyper-parameters of the optimizer that differ and that stock would take from the checkpoint in silence.

    Args:
        saved: the checkpoint's parameter groups.
        own: this run's, made from its flags.
        overrides: ``--optimizer-overrides``, by name.
    """
    if len(saved) != len(own):
        return [
            f"the optimizer has {len(saved)} groups of parameters in the checkpoint and {len(own)} in this run (pass "
            "--reset-optimizer to begin with fresh moments)"
        ]
    found = []
    for before, now in zip(saved, own, strict=True):
        for name in before.keys() & now.keys() - {"params", "lr", "initial_lr"} - set(overrides or {}):
            old, new = before[name], now[name]
            if _plain(old) != _plain(new):
                found.append(
                    f"{name} is {old} in the checkpoint and {new} in this run (pass --optimizer-overrides "
                    f'"{{{name!r}: {new!r}}}" to change it)'
                )
    return list(dict.fromkeys(sorted(found)))


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else value


def model_changes(saved: Any, wanted: Any) -> list[str]:
    """List flags of the model that differ, ``--dropout 0.1 -> 0.0``; none of them keeps a model from loading.

    Args:
        saved: the checkpoint's model configuration.
        wanted: this run's.
    """
    found = []
    for name in (field.name for field in fields(MoETransformerLanguageModelConfig)):
        if name in _NOT_OF_THE_MODEL:
            continue
        old, new = (_value(cfg, name) for cfg in (saved, wanted))
        if old is not _ABSENT and new is not _ABSENT and old != new:
            found.append(f"--{name.replace('_', '-')} {old} -> {new}")
    return found
