"""List the stock fairseq flags that touch an MoE model: supported (with the test), or refused (with the reason).

Checked before anything is read. ``docs/flags.md`` shows the same table; a test keeps the two equal.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fairseq_moe.flags.records import getter

__all__ = ["STOCK_FLAGS", "StockFlag", "stock_flag_problems"]


@dataclass(frozen=True, kw_only=True)
class StockFlag:
    """Describe what an MoE model makes of one flag.

    Args:
        flag: as typed.
        group: group of the fairseq configuration that holds it.
        field: its name there.
        refused: whether a value means that the flag is in use.
        reason: why an MoE model cannot honour it and what to do instead; empty for a supported flag.
        test: the test that shows a supported flag at work.
    """

    flag: str
    group: str = ""
    field: str = ""
    refused: Callable[[Any], bool] = bool
    reason: str = ""
    test: str = ""


def _positive(value: Any) -> bool:
    return (value or 0) > 0


def _is_not(default: Any) -> Callable[[Any], bool]:
    return lambda value: value is not None and value != default


STOCK_FLAGS = (
    StockFlag(flag="--ddp-backend legacy_ddp", test="tests/distributed/test_training_equality.py"),
    StockFlag(flag="--ddp-backend pytorch_ddp", test="tests/distributed/test_training_equality.py"),
    StockFlag(flag="--ddp-backend fully_sharded", test="tests/distributed/test_training_equality.py"),
    StockFlag(flag="--update-freq", test="tests/distributed/test_training_equality.py"),
    StockFlag(flag="--clip-norm", test="tests/distributed/test_training_equality.py"),
    StockFlag(flag="--checkpoint-activations", test="tests/distributed/test_training_equality.py"),
    StockFlag(flag="--fp16 --fp16-no-flatten-grads", test="tests/distributed/test_precision.py"),
    StockFlag(flag="--memory-efficient-fp16", test="tests/distributed/test_precision.py"),
    StockFlag(flag="--bf16, --memory-efficient-bf16", test="tests/distributed/test_precision.py"),
    StockFlag(flag="--fp16-adam-stats", test="tests/unit/optim/test_half_adam.py"),
    StockFlag(
        flag="--ddp-backend slowmo",
        group="distributed_training",
        field="ddp_backend",
        refused=lambda value: str(value) == "slowmo",
        reason="it averages all parameters, experts included; use legacy_ddp, pytorch_ddp or fully_sharded",
    ),
    StockFlag(
        flag="--write-checkpoints-asynchronously",
        group="checkpoint",
        field="write_checkpoints_asynchronously",
        reason="stock writes the file of rank 0 alone so, and no checkpoint_last.pt; use --save-in-background",
    ),
    StockFlag(
        flag="--decoder-layerdrop",
        group="model",
        field="decoder_layerdrop",
        refused=_positive,
        reason="ranks would skip different layers and wait for each other for ever; set it to 0",
    ),
    StockFlag(
        flag="--store-ema",
        group="ema",
        field="store_ema",
        reason="its copy of the model loses the mark of the expert weights; average checkpoints afterwards "
        "instead",
    ),
    StockFlag(
        flag="--amp",
        group="common",
        field="amp",
        reason="its scaler does not agree on overflow between ranks; use --fp16 --fp16-no-flatten-grads, "
        "--memory-efficient-fp16 or --bf16",
    ),
    StockFlag(
        flag="--use-bmuf",
        group="optimization",
        field="use_bmuf",
        reason="it averages all parameters, experts included; leave it out",
    ),
    StockFlag(
        flag="--zero-sharding",
        group="distributed_training",
        field="zero_sharding",
        refused=_is_not("none"),
        reason="it shards expert optimizer state over ranks that do not own it; use --use-distributed-optimizer",
    ),
    StockFlag(
        flag="--cpu-offload",
        group="distributed_training",
        field="cpu_offload",
        reason="offloaded shards bypass the expert gradient scale; leave it out",
    ),
    StockFlag(
        flag="--offload-activations",
        group="model",
        field="offload_activations",
        reason="the routing of a recomputed layer would leave the device; use --checkpoint-activations alone",
    ),
    StockFlag(
        flag="--use-sharded-state",
        group="distributed_training",
        field="use_sharded_state",
        reason="expert shards are always saved per owner and load on any number of ranks; leave it out",
    ),
    StockFlag(
        flag="--not-fsdp-flatten-parameters",
        group="distributed_training",
        field="not_fsdp_flatten_parameters",
        reason="fairscale frees parameters one by one while the backward pass still needs them; leave it out",
    ),
    StockFlag(
        flag="--quant-noise-pq",
        group="model",
        field="quant_noise_pq",
        refused=_positive,
        reason="it wraps single linear layers and expert weights are stacked; set it to 0",
    ),
    StockFlag(
        flag="--quant-noise-scalar",
        group="model",
        field="quant_noise_scalar",
        refused=_positive,
        reason="it replaces single linear layers and expert weights are stacked; set it to 0",
    ),
    StockFlag(
        flag="--quantization-config-path",
        group="common",
        field="quantization_config_path",
        refused=_is_not(None),
        reason="it replaces single linear layers and expert weights are stacked; leave it out",
    ),
    StockFlag(
        flag="--base-layers",
        group="model",
        field="base_layers",
        refused=_positive,
        reason="BASE layers and MoE layers claim the same parameter marks; use one of the two",
    ),
    StockFlag(
        flag="--adaptive-softmax-cutoff",
        group="model",
        field="adaptive_softmax_cutoff",
        refused=_is_not(None),
        reason="its criterion does not add the gate loss; leave it out and use --criterion moe_cross_entropy",
    ),
    StockFlag(
        flag="--adaptive-input",
        group="model",
        field="adaptive_input",
        reason="it is untested with experts; use plain embeddings",
    ),
    StockFlag(
        flag="--character-embeddings",
        group="model",
        field="character_embeddings",
        reason="they are untested with experts; use plain embeddings",
    ),
    StockFlag(
        flag="--scale-fc",
        group="model",
        field="scale_fc",
        reason="the stacked experts have no layer norm between their two matrices; leave it out",
    ),
    StockFlag(
        flag="--pipeline-model-parallel",
        group="distributed_training",
        field="pipeline_model_parallel",
        reason="stock's pipeline knows none of our layers; use --pipeline-model-parallel-size",
    ),
    StockFlag(
        flag="--pipeline-balance",
        group="distributed_training",
        field="pipeline_balance",
        refused=_is_not(None),
        reason="it belongs to stock's pipeline; use --decoder-first-pipeline-num-layers and "
        "--decoder-last-pipeline-num-layers with --pipeline-model-parallel-size",
    ),
    StockFlag(
        flag="--pipeline-devices",
        group="distributed_training",
        field="pipeline_devices",
        refused=_is_not(None),
        reason="it belongs to stock's pipeline; with --pipeline-model-parallel-size each stage is a rank",
    ),
    StockFlag(
        flag="--pipeline-chunks",
        group="distributed_training",
        field="pipeline_chunks",
        refused=_positive,
        reason="it belongs to stock's pipeline; the micro-batches of --pipeline-model-parallel-size are those of "
        "--update-freq",
    ),
    StockFlag(
        flag="--model-parallel-size",
        group="common",
        field="model_parallel_size",
        refused=_is_not(1),
        reason="it belongs to stock's own Megatron models; use --tensor-model-parallel-size with --sequence-parallel",
    ),
    StockFlag(
        flag="--tpu",
        group="common",
        field="tpu",
        reason="the expert exchange needs NCCL or gloo; run on GPUs or with --cpu",
    ),
)


_TASKS_THAT_READ = ("language_modeling", "multilingual_language_modeling")


def stock_flag_problems(cfg: Any) -> list[str]:
    """List one sentence per stock flag in use that an MoE model cannot honour."""
    found = []
    for entry in STOCK_FLAGS:
        group = getattr(cfg, entry.group, None) if entry.group else None
        value = getattr(group, entry.field, None) if group is not None else None
        if entry.reason and entry.refused(value):
            found.append(f"{entry.flag} ({value}) does not work with an MoE model: {entry.reason}.")
    for problems in (_flat_fp16_problem, _sharded_precision_problems, _block_problem, _data_problem):
        found += problems(cfg)
    return found


def _flat_fp16_problem(cfg: Any) -> list[str]:
    common = cfg.common
    is_flat = common.fp16 and not common.memory_efficient_fp16 and not common.fp16_no_flatten_grads
    if not is_flat or str(cfg.distributed_training.ddp_backend) == "fully_sharded":
        return []
    return [
        "--fp16 alone flattens all parameters into one tensor and loses the mark of the expert weights; add "
        "--fp16-no-flatten-grads or use --memory-efficient-fp16."
    ]


def _sharded_precision_problems(cfg: Any) -> list[str]:
    common, training = cfg.common, cfg.distributed_training
    if str(training.ddp_backend) != "fully_sharded":
        return []
    found = []
    if common.bf16 or common.memory_efficient_bf16:
        found.append(
            "--bf16 does not work with an MoE model under --ddp-backend fully_sharded, since fairscale "
            "knows float16 only; use --use-torch-fsdp2 in its place, or --fp16."
        )
    if training.fp32_reduce_scatter and not (common.fp16 and not common.memory_efficient_fp16):
        found.append(
            "--fp32-reduce-scatter needs --fp16 without --memory-efficient-fp16; leave it out or change the "
            "precision."
        )
    return found


def _block_problem(cfg: Any) -> list[str]:
    task, model = getattr(cfg, "task", None), cfg.model
    block, limit = getattr(task, "tokens_per_sample", None), getattr(model, "max_target_positions", None)
    cuts = str(getattr(task, "sample_break_mode", None)).lower() == "none"
    if not cuts or block is None or limit is None or block <= limit:
        return []
    return [
        f"--tokens-per-sample is {block}, but --max-target-positions is {limit}, so every block of text would be "
        "left out as too long; lower the one or raise the other."
    ]


def _data_problem(cfg: Any) -> list[str]:
    """Refuse a task that reads text and was not told where; only hydra's users can leave that out."""
    task = getattr(cfg, "task", None)
    if getattr(task, "_name", None) not in _TASKS_THAT_READ or getter(task)("data"):
        return []
    return [
        "task.data is not given; name the directory that fairseq-preprocess has written, as task.data=DIRECTORY on "
        "the command line or in the configuration."
    ]
