"""Every reason to refuse parallel axes that flags ask for: one sentence each; and what is said of them at the start."""

from collections.abc import Iterator
from typing import Any

from fairseq_moe.flags.blocks import BlocksConfig
from fairseq_moe.flags.blocks_checks import replaced_block_problems
from fairseq_moe.flags.megatron import MegatronConfig, moe_layer_pattern
from fairseq_moe.flags.moe import MoEConfig
from fairseq_moe.flags.parallel import ParallelConfig
from fairseq_moe.flags.pipeline_checks import pipeline_problems
from fairseq_moe.flags.records import Range, changed_fields, flag_name, getter, ranges
from fairseq_moe.flags.sharding import NOT_ELEMENTWISE, ShardingConfig
from fairseq_moe.parallel.experts import layout_problem

__all__ = ["parallel_notes", "parallel_problems", "spread_problems"]

_SPLITTING = ("tensor_model_parallel_size", "context_parallel_size")
_AXES = (*_SPLITTING, "pipeline_model_parallel_size")
_SIZES = (*_AXES, "num_virtual_stages_per_pipeline_rank")  # 1 is as if not given
_LAYERS = (
    "num_layers_per_virtual_pipeline_stage",
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
)
_AT_LEAST_1: Range = (lambda size: size >= 1, "at least 1")
_RANGES: dict[str, Range] = dict.fromkeys((*_SIZES, *_LAYERS), _AT_LEAST_1)

# They look at all tokens of a batch, of which a rank has a part.
_WHOLE_BATCH_TYPES = ("expert_choice", "sinkhorn")
_WRAPPERS = ("c10d", "pytorch_ddp", "fully_sharded")  # c10d: stock's old name of pytorch_ddp


def spread_problems(moe: MoEConfig, *, world_size: int) -> list[str]:
    """List why experts cannot be spread evenly over the ranks, in at most one sentence.

    Args:
        moe: the flags, of which a model has experts.
        world_size: number of ranks that will take part.
    """
    parallel, megatron, axes = moe.parallel, moe.megatron, moe.axes
    if ranges(parallel, _RANGES):
        return []  # they are refused as such
    problem = layout_problem(num_experts=moe.num_experts, world_size=world_size, **axes._asdict())
    if problem is None:
        return []
    given = megatron.expert_model_parallel_size
    if world_size % (axes.pipe * axes.tensor * axes.context) or (given is not None and given < 1):
        return [problem]
    if (parallel.moe_extended_tp or parallel.moe_extended_ep) and not parallel.extends_nothing(megatron):
        flag = "--moe-extended-tp" if parallel.moe_extended_tp else "--moe-extended-ep"
        verb = "divides each expert" if parallel.moe_extended_tp else "spreads experts"
        sizes = f"{axes.tensor}" if given is None else f"{axes.tensor} x {given}"
        return [f"{flag} {verb} over {sizes} ranks (tensor x expert): {problem}"]
    if _follows_tensor(moe):
        return [f"{problem[:-1]}; each expert is divided as all else is, unless {_WAY_OUT} is given."]
    return [problem]


def parallel_problems(cfg: Any, moe: MoEConfig) -> list[str]:
    """List one sentence per reason why ranks cannot share micro-batches, or experts, as the flags ask.

    Args:
        cfg: a whole fairseq configuration.
        moe: the model's flags about experts, which are part of it.
    """
    parallel = moe.parallel
    found = ranges(parallel, _RANGES)
    if found:
        return found
    given = [name for name in changed_fields(parallel) if name not in _SIZES or getattr(parallel, name) != 1]
    if not moe.enabled:
        names = ", ".join(flag_name(name) for name in given)
        return [f"{names}: no layer has experts, and only models with experts are split so."] if given else []
    found += _flag_problems(parallel, moe.megatron)
    found += _parts_problems(moe, cfg)
    found += _optimizer_problems(moe, cfg)
    found += pipeline_problems(cfg, moe)
    if parallel.splits_batches:
        axis = _first_axis(_SPLITTING, parallel)
        found += _width_problems(moe, cfg.model)
        found += _model_problems(moe, cfg.model, axis)
        found += _criterion_problems(cfg, axis)
    if parallel.shares_batches:
        found += _wrapper_problems(cfg, _first_axis(_AXES, parallel))
    return found


def _first_axis(names: tuple[str, ...], parallel: ParallelConfig) -> str:
    return next(_sized(name, parallel) for name in names if (getattr(parallel, name) or 1) > 1)


def _sized(name: str, parallel: ParallelConfig) -> str:
    return f"{flag_name(name)} {getattr(parallel, name)}"


def _flag_problems(parallel: ParallelConfig, megatron: MegatronConfig) -> list[str]:
    """List what the flags about axes say against one another."""
    found = []
    if parallel.tensor > 1 and not parallel.sequence_parallel:
        found.append(
            f"{_sized('tensor_model_parallel_size', parallel)} needs --sequence-parallel, so that every router and "
            "dropout sees tokens of its own; add it."
        )
    if parallel.cp_comm_type not in (None, "all_gather"):
        found.append(
            f"--cp-comm-type is {parallel.cp_comm_type!r}, expected all_gather, the one way there is to see the keys "
            "and values of other ranks."
        )
    elif parallel.cp_comm_type is not None and parallel.context == 1:
        found.append("--cp-comm-type needs a --context-parallel-size above 1; leave it out.")
    extended = [name for name in ("moe_extended_tp", "moe_extended_ep") if getattr(parallel, name)]
    if len(extended) == 2:
        found.append("--moe-extended-tp divides experts that --moe-extended-ep leaves whole; choose one.")
    elif extended and megatron.expert_tensor_parallel_size is not None:
        found.append(
            f"{flag_name(extended[0])} sets over how many ranks each expert is divided, and so does "
            "--expert-tensor-parallel-size; leave one out."
        )
    return found


_WAY_OUT = "--expert-tensor-parallel-size 1"


def _follows_tensor(moe: MoEConfig) -> bool:
    """Tell whether experts are divided only because all else is."""
    return (
        moe.axes.expert_tensor > 1
        and not moe.parallel.moe_extended_tp
        and moe.megatron.expert_tensor_parallel_size is None
    )


def _parts_problems(moe: MoEConfig, cfg: Any) -> list[str]:
    """List why experts cannot be divided over ranks as the flags ask."""
    parts = moe.axes.expert_tensor
    if parts <= 1:
        return []
    model, found, way_out = getter(cfg.model), [], ""
    name = f"--expert-tensor-parallel-size {parts}"
    if moe.parallel.moe_extended_tp:
        name = f"--moe-extended-tp, which divides each expert over {parts} ranks,"
    elif _follows_tensor(moe):
        name = f"--tensor-model-parallel-size {parts}, which divides each expert, too,"
        way_out = f", or add {_WAY_OUT}"
    width = moe.expert_dim or model("decoder_ffn_embed_dim")
    if width is not None and width % parts:
        found.append(f"{name} does not divide the experts' width {width}; choose a divisor{way_out}.")
    if str(cfg.distributed_training.ddp_backend) == "fully_sharded" and not moe.parallel.shares_batches:
        found.append(
            f"{name} does not go with --ddp-backend fully_sharded, which flattens what lies on the ranks in different "
            "ways; use --use-torch-fsdp2 in its place."
        )
    if moe.megatron.dispatcher == "padded":
        found.append(
            f"{name} sends each row to {parts} ranks, which --moe-pad-expert-input-to-capacity does not count; leave "
            f"one of the two out{way_out}."
        )
    if moe.megatron.dispatcher == "allgather" and (model("dropout") or 0) > 0:
        found.append(
            f"{name} with --moe-token-dispatcher-type allgather adds up experts before their outputs could be dropped; "
            f"set --dropout 0, or leave the dispatcher out{way_out}."
        )
    return found


def _optimizer_problems(moe: MoEConfig, cfg: Any) -> list[str]:
    optimizer = getattr(getattr(cfg, "optimizer", None), "_name", None)
    is_cut = moe.axes.tensor > 1 or moe.axes.expert_tensor > 1
    if optimizer not in NOT_ELEMENTWISE or not is_cut or ShardingConfig.from_args(cfg.model).wanted:
        return []  # ``sharding_problems`` refuses it with sharded states
    name = _sized("tensor_model_parallel_size", moe.parallel)
    if moe.axes.tensor == 1:
        name = "--moe-extended-tp" if moe.parallel.moe_extended_tp else "--expert-tensor-parallel-size"
    return [
        f"--optimizer {optimizer} looks at whole tensors, of which a rank holds a part with {name}; choose adam, sgd "
        "or another one that steps each number by itself."
    ]


def _width_problems(moe: MoEConfig, model_flags: Any) -> list[str]:
    """List which numbers of heads and widths the tensor ranks do not divide."""
    parallel, model = moe.parallel, getter(model_flags)
    name, size, found = _sized("tensor_model_parallel_size", parallel), parallel.tensor, []
    sizes = {field: model(field) for field in ("decoder_attention_heads", "decoder_kv_heads")}
    if _has_dense_layers(moe):
        sizes["decoder_ffn_embed_dim"] = model("decoder_ffn_embed_dim")
    for field, number in sizes.items():
        if number is not None and number % size:
            found.append(f"{name} does not divide {flag_name(field)} {number}; choose a divisor.")
    return found


def _has_dense_layers(moe: MoEConfig) -> bool:
    if not moe.megatron.selected:
        return moe.moe_freq > 1
    try:
        return not all(moe_layer_pattern(moe.megatron.moe_layer_freq or "1", moe.decoder_layers))
    except ValueError:
        return False  # ``megatron_problems`` says so


def _model_problems(moe: MoEConfig, model_flags: Any, axis: str) -> list[str]:
    """List which parts of a model cannot be split within a micro-batch."""
    found = []
    blocks, model = BlocksConfig.from_args(model_flags), getter(model_flags)
    if not blocks.enabled:
        found += replaced_block_problems(model_flags, axis)
        if not model("decoder_normalize_before"):
            found.append(
                f"{axis} needs layers that normalise before each block; add --decoder-normalize-before."
            )
    if blocks.mtp_loss_weight > 0:
        found.append(
            f"--mtp-loss-weight needs every position's next tokens, of which a rank has a part with {axis}; leave one "
            "out."
        )
    kinds = [kind for kind in moe.megatron.balancing_types if kind in _WHOLE_BATCH_TYPES]
    if kinds:
        found.append(
            f"--moe-router-load-balancing-type {kinds[0]} looks at all tokens of a batch, of which a rank has a part "
            f"with {axis}; choose another type."
        )
    return found


def _criterion_problems(cfg: Any, axis: str) -> list[str]:
    criterion = getattr(getattr(cfg, "criterion", None), "_name", None)
    if criterion in (None, "moe_cross_entropy"):
        return []
    return [
        f"--criterion {criterion} does not know that a rank has a part of each micro-batch with {axis}; use "
        "--criterion moe_cross_entropy."
    ]


def _wrapper_problems(cfg: Any, axis: str) -> list[str]:
    """List which of stock's wrappers are asked for that cannot be around a model whose micro-batches ranks share."""
    found = []
    backend, get = str(cfg.distributed_training.ddp_backend), getter(cfg.distributed_training)
    shards = ShardingConfig.from_args(cfg.model).wanted is not None
    if backend == "fully_sharded" or (backend in _WRAPPERS and not shards):
        found.append(
            f"--ddp-backend {backend} sums all gradients over all ranks, which is wrong with {axis}; use --ddp-backend "
            "legacy_ddp, --use-distributed-optimizer or --use-torch-fsdp2."
        )
    if (get("heartbeat_timeout") or -1) > 0 and not shards:
        found.append(
            f"--heartbeat-timeout {get('heartbeat_timeout')} is not there with {axis}; leave it out: "
            "--collective-timeout-sec ends a run that waits."
        )
    return found


def parallel_notes(args: Any) -> Iterator[str]:
    """Say, one sentence each, which flags about axes do nothing, or other than they seem to.

    Args:
        args: the model's flags (a namespace, config or mapping), of which nothing is refused.
    """
    parallel, megatron = ParallelConfig.from_args(args), MegatronConfig.from_args(args)
    if parallel.sequence_parallel and parallel.tensor == 1:
        yield "--sequence-parallel does nothing without a --tensor-model-parallel-size above 1, as in Megatron."
    if parallel.tp_comm_overlap and parallel.tensor == 1:
        yield (
            "--tp-comm-overlap does nothing without a --tensor-model-parallel-size above 1: there is nothing to "
            "overlap."
        )
    elif parallel.tp_comm_overlap:
        yield (
            "--tp-comm-overlap does nothing here: gathers and products would have to overlap by chunks, for which on a "
            "CPU both want the same cores, and which between GPUs nobody has measured yet."
        )
    if parallel.extends_nothing(megatron):
        flag, also = "--moe-extended-ep", ""
        if parallel.moe_extended_tp:
            flag, also = "--moe-extended-tp", " or --expert-model-parallel-size"
        yield f"{flag} does nothing without a --tensor-model-parallel-size{also} above 1: there is nothing to extend."
    elif parallel.moe_extended_tp:
        yield (
            "--moe-extended-tp does not need --moe-token-dispatcher-type allgather here: alltoall carries parts of "
            "experts by the same exchange as whole ones."
        )
    if parallel.splits_batches and getter(args)("fused_attention"):
        yield (
            "--fused-attention does nothing with --tensor-model-parallel-size or --context-parallel-size, whose "
            "attention uses torch's fused kernels anyway."
        )
