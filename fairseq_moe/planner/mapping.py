"""Read out of the flags how a model is spread: ranks of each axis, precision, micro-batches, what is computed again."""

import enum
import functools
from dataclasses import dataclass
from typing import Any

from fairseq_moe.errors import ConfigError
from fairseq_moe.flags.moe import MoEConfig
from fairseq_moe.flags.sharding import Sharding, ShardingConfig
from fairseq_moe.parallel.ranks import RankGrid
from fairseq_moe.parallel.stages import StageLayout

__all__ = ["Mapping", "Precision", "States", "mapping_of", "precision_of"]

# Tensors of a parameter's size that each optimizer keeps; what is not here has none, or other sizes.
_MOMENTS = {"adam": 2, "adamax": 2, "adadelta": 2, "adagrad": 1, "nag": 1, "sgd": 1}


class States(enum.Enum):
    """Name what a rank holds a shard of, in place of a copy."""

    COPIED = "copied"
    ZERO_1 = "ZeRO-1"
    ZERO_3 = "ZeRO-3"
    FAIRSCALE = "fully_sharded"


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Count the bytes that each number of a trained parameter takes.

    Args:
        weight: of what the model computes with.
        grad: of its gradient.
        copy: of the float32 copy that is stepped in its place; 0: none.
        copy_grad: of the gradient of that copy; 0: none.
        moments: of all of the optimizer's states.
        gathered: of a weight that a shard was gathered to.
    """

    weight: int
    grad: int
    copy: int
    copy_grad: int
    moments: int
    gathered: int

    @property
    def optimizer(self) -> int:
        """Bytes besides the weight and its gradient."""
        return self.copy + self.copy_grad + self.moments


@dataclass(frozen=True, kw_only=True)
class Mapping:
    """Hold how a model is spread over ranks, and what each computes of an update.

    Args:
        grid: sizes of all axes.
        virtual: V, chunks of layers of each pipeline rank.
        first: layers of the first pipeline rank; None: as many as the others.
        last: the same of the last.
        states: what is sharded.
        sequences: of a micro-batch.
        length: S, positions of each.
        micro_batches: m, of an update.
        recompute: ``layers``, ``moe``, ``experts``, ``shared_experts``: what the backward pass computes again.
        dispatcher: ``alltoall``, ``allgather`` or ``padded``.
        min_params_to_wrap: of fairscale, parameters from which it shards a layer by itself.
    """

    grid: RankGrid
    virtual: int
    first: int | None
    last: int | None
    states: States
    sequences: int
    length: int
    micro_batches: int
    recompute: frozenset[str]
    dispatcher: str
    min_params_to_wrap: int = 0

    @property
    def context_tokens(self) -> int:
        """Tokens of a context rank in a micro-batch, with those that fill up sequences to equal parts."""
        grid = self.grid
        if grid.context * grid.tensor == 1:
            return self.sequences * self.length
        parts = grid.tensor * (2 * grid.context if grid.context > 1 else 1)
        return self.sequences * (-(-self.length // parts) * parts) // grid.context

    @property
    def own_tokens(self) -> int:
        """Tokens of a rank between blocks."""
        return self.context_tokens // self.grid.tensor

    @property
    def update_tokens(self) -> int:
        """Tokens of an update, over all ranks."""
        return self.sequences * self.length * self.micro_batches * self.grid.data

    @property
    def dense_shards(self) -> int:
        """Ranks over which a dense parameter's states are sharded."""
        if self.states is States.COPIED:
            return 1
        return self.grid.data * self.grid.context

    @property
    def expert_shards(self) -> int:
        """Ranks over which an expert's states are sharded."""
        return 1 if self.states is States.COPIED else self.grid.expert_replica

    def stages(self, num_layers: int) -> StageLayout:
        """Spread decoder layers over the pipeline."""
        return _stages(num_layers, self.grid.pipe, self.virtual, self.first, self.last)

    def layers_of(self, pipe: int, num_layers: int) -> tuple[int, ...]:
        """List the layers of a pipeline rank, over all of its chunks."""
        return _layers_of(self.stages(num_layers), pipe)

    @property
    def name(self) -> str:
        """Name the axes that are larger than 1, as in ``P4 V8 D16 E8``."""
        grid = self.grid
        sizes = {
            "P": grid.pipe, "V": self.virtual, "D": grid.data, "C": grid.context, "T": grid.tensor,
            "E": grid.expert, "X": grid.expert_tensor,
        }  # fmt: skip
        said = [f"{axis}{size}" for axis, size in sizes.items() if size > 1]
        if self.states is not States.COPIED:
            said.append(self.states.value)
        return " ".join(said) or "one rank"


@functools.lru_cache(maxsize=1 << 12)
def _stages(num_layers: int, pipe: int, virtual: int, first: int | None, last: int | None) -> StageLayout:
    return StageLayout(num_layers=num_layers, pipe=pipe, virtual=virtual, first=first, last=last)


@functools.lru_cache(maxsize=1 << 14)
def _layers_of(layout: StageLayout, pipe: int) -> tuple[int, ...]:
    return tuple(index for chunk in range(layout.virtual) for index in layout.layers_of(pipe, chunk))


def mapping_of(cfg: Any, args: Any, *, num_ranks: int) -> Mapping:
    """Read the mapping that a run of ``num_ranks`` ranks with these flags has.

    Args:
        cfg: a whole fairseq configuration of which nothing is refused.
        args: the model's flags.
        num_ranks: that take part.
    """
    moe, axes = MoEConfig.from_args(args), MoEConfig.from_args(args).axes
    stage_ranks = num_ranks // axes.pipe
    expert = axes.ep_size or min(stage_ranks // axes.expert_tensor, moe.num_experts)
    is_spread = moe.enabled
    grid = RankGrid(
        data=num_ranks // (axes.pipe * axes.tensor * axes.context),
        pipe=axes.pipe,
        context=axes.context,
        tensor=axes.tensor,
        expert=expert if is_spread else 1,
        expert_tensor=axes.expert_tensor if is_spread else 1,
    )
    layout = moe.parallel.stages(moe.decoder_layers)
    length = int(args.tokens_per_sample)
    return Mapping(
        grid=grid,
        virtual=layout.virtual,
        first=layout.first,
        last=layout.last,
        states=_states_of(cfg, args, num_ranks),
        sequences=_sequences_of(cfg, length),
        length=length,
        micro_batches=int(cfg.optimization.update_freq[0]),
        recompute=moe.recompute_modules | ({"layers"} if moe.checkpoint_activations else frozenset()),
        dispatcher=moe.megatron.dispatcher,
        min_params_to_wrap=int(getattr(args, "min_params_to_wrap", 0) or 0),
    )


def _states_of(cfg: Any, args: Any, num_ranks: int) -> States:
    if str(cfg.distributed_training.ddp_backend) == "fully_sharded":
        return States.FAIRSCALE
    wanted = ShardingConfig.from_args(args).wanted
    if wanted is None or num_ranks == 1:
        return States.COPIED
    return States.ZERO_1 if wanted is Sharding.OPTIMIZER else States.ZERO_3


def _sequences_of(cfg: Any, length: int) -> int:
    """Count the sequences of a micro-batch, as batches of whole blocks have them."""
    by_size, by_tokens = cfg.dataset.batch_size, cfg.dataset.max_tokens
    if by_size is None and by_tokens is None:
        raise ConfigError(
            ["neither --batch-size nor --max-tokens is given, expected one: the size of a micro-batch."]
        )
    sizes = [int(by_size)] if by_size is not None else []
    if by_tokens is not None:
        sizes.append(int(by_tokens) // length)
    if min(sizes) < 1:
        raise ConfigError(
            [f"--max-tokens {by_tokens} is less than a sequence of --tokens-per-sample {length}; raise it."]
        )
    return min(sizes)


def precision_of(cfg: Any, *, runs_kernels: bool) -> Precision:
    """Read how many bytes each number takes.

    Args:
        cfg: a whole fairseq configuration.
        runs_kernels: of the device: Adam's kernel then reads half-precision gradients itself.

    Raises:
        ConfigError: the optimizer is one whose states are not of the parameters' sizes.
    """
    common, optimizer = cfg.common, str(cfg.optimizer._name)
    if optimizer not in _MOMENTS:
        raise ConfigError(
            [
                f"--optimizer is {optimizer}, whose states the planner does not know, expected one of "
                f"{', '.join(_MOMENTS)}."
            ]
        )
    count = _MOMENTS[optimizer]
    if optimizer == "sgd" and not cfg.optimizer.momentum:
        count = 0
    moment = 2 if optimizer == "adam" and getattr(cfg.optimizer, "fp16_adam_stats", False) else 4
    moments = count * moment
    is_half = bool(common.fp16 or common.bf16)
    if not is_half:
        return Precision(weight=4, grad=4, copy=0, copy_grad=0, moments=moments, gathered=4)
    if common.memory_efficient_fp16 or common.memory_efficient_bf16:
        return Precision(weight=2, grad=2, copy=0, copy_grad=0, moments=moments, gathered=2)
    if (
        str(cfg.distributed_training.ddp_backend) == "fully_sharded"
    ):  # float32 shards, gathered in half precision
        return Precision(weight=4, grad=4, copy=0, copy_grad=0, moments=moments, gathered=2)
    lends = runs_kernels and optimizer == "adam"
    return Precision(weight=2, grad=2, copy=4, copy_grad=0 if lends else 4, moments=moments, gathered=2)
