"""Which pipeline rank holds which decoder layers: pure arithmetic on integers.

Each of P pipeline ranks holds V *chunks* of consecutive layers ("virtual stages" in Megatron's flags). A chunk of a
rank is a stage, and a token passes the stages in the order of their numbers s = v * P + p: with V > 1 it goes round
the ranks V times. As in Megatron-Core, the first and last numbers of layers that a user gives are those of the first
and last *rank* over all its chunks, the other ranks share the rest evenly, and each rank's layers divide evenly into
its V chunks. DeepSeek-V2's 2 + 14 x 4 + 2 layers on 16 ranks with V = 2:

    stage      0    1    2   ...  14     15   16   17     ...  30     31
    rank       0    1    2   ...  14     15    0    1     ...  14     15
    layers     0   1-2  3-4  ... 27-28   29   30   31-32  ... 57-58   59
"""

from dataclasses import dataclass

from fairseq_moe.errors import ConfigError

__all__ = ["StageLayout", "stage_problem", "virtual_stages"]

_PIPE = "--pipeline-model-parallel-size"
_VIRTUAL = "--num-virtual-stages-per-pipeline-rank"
_PER_STAGE = "--num-layers-per-virtual-pipeline-stage"
_FIRST = "--decoder-first-pipeline-num-layers"
_LAST = "--decoder-last-pipeline-num-layers"


def stage_problem(
    *,
    num_layers: int,
    pipe: int,
    virtual: int | None = None,
    layers_per_stage: int | None = None,
    first: int | None = None,
    last: int | None = None,
) -> str | None:
    """Say in one sentence why ``num_layers`` layers cannot be cut into these stages; None if they can.

    ``virtual`` and ``layers_per_stage`` are the two ways to ask for virtual stages; None: not given.
    """
    given = {_PIPE: pipe, _VIRTUAL: virtual, _PER_STAGE: layers_per_stage, _FIRST: first, _LAST: last}
    for flag, value in given.items():
        if value is not None and value < 1:
            return f"{flag} is {value}, expected at least 1."
    if virtual is not None and layers_per_stage is not None:
        return f"{_VIRTUAL} and {_PER_STAGE} are two ways to say the same; give one of them."
    ends = [flag for flag in (_FIRST, _LAST) if given[flag] is not None]
    if layers_per_stage is not None and ends:
        return f"{_PER_STAGE} does not say how to cut ranks of different sizes ({ends[0]}); give {_VIRTUAL} instead."
    if pipe == 1:
        return _problem_of_one_rank(num_layers, virtual, layers_per_stage, ends)
    return _problem_of_ranks(num_layers, pipe, first, last) or _problem_of_chunks(
        _layers_of_ranks(num_layers, pipe, first, last), num_layers, virtual, layers_per_stage
    )


def _problem_of_one_rank(
    num_layers: int, virtual: int | None, layers_per_stage: int | None, ends: list[str]
) -> str | None:
    several = [_VIRTUAL] if virtual not in (None, 1) else []
    several += [_PER_STAGE] if layers_per_stage not in (None, num_layers) else []
    flags = several + ends
    return (
        f"{flags[0]} needs several pipeline ranks; give {_PIPE} above 1 too, or drop it." if flags else None
    )


def _problem_of_ranks(num_layers: int, pipe: int, first: int | None, last: int | None) -> str | None:
    if pipe > num_layers:
        return f"{_PIPE} is {pipe}, expected at most the {num_layers} layers; each rank needs one."
    rest = num_layers - (first or 0) - (last or 0)
    others = pipe - (first is not None) - (last is not None)
    if others == 0:
        if rest == 0:
            return None
        return (
            f"{_FIRST} {first} and {_LAST} {last} are all {pipe} ranks, expected {num_layers} layers in sum."
        )
    if rest >= others and rest % others == 0:
        return None
    if others == pipe:
        return (
            f"{num_layers} layers do not divide by {_PIPE} {pipe}; choose a divisor, or give the end ranks layers "
            f"of their own by {_FIRST} and {_LAST}."
        )
    ends = " and ".join(
        f"{flag} {size}" for flag, size in ((_FIRST, first), (_LAST, last)) if size is not None
    )
    return (
        f"With {ends}, {rest} of {num_layers} layers are for the other {others} of {pipe} pipeline ranks, expected a "
        f"multiple of {others} above 0; change one of these numbers."
    )


def _problem_of_chunks(
    layers: list[int], num_layers: int, virtual: int | None, layers_per_stage: int | None
) -> str | None:
    if layers_per_stage is not None and layers[0] % layers_per_stage:
        return (
            f"{_PER_STAGE} is {layers_per_stage}, expected a divisor of the {layers[0]} layers of each rank."
        )
    if virtual is None:
        return None
    stages = len(layers) * virtual
    if stages > num_layers:
        return (
            f"{_PIPE} {len(layers)} times {_VIRTUAL} {virtual} is {stages} stages, expected at most the "
            f"{num_layers} layers; each stage needs one."
        )
    for rank, size in enumerate(layers):
        if size % virtual:
            return (
                f"{_VIRTUAL} is {virtual}, expected a divisor of the {size} layers of pipeline rank {rank}."
            )
    return None


def virtual_stages(*, num_layers: int, pipe: int, layers_per_stage: int) -> int:
    """Turn --num-layers-per-virtual-pipeline-stage into V, for sizes in which ``stage_problem`` finds nothing."""
    return num_layers // pipe // layers_per_stage


def _layers_of_ranks(num_layers: int, pipe: int, first: int | None, last: int | None) -> list[int]:
    """Count the layers of each pipeline rank."""
    middle = pipe - (first is not None) - (last is not None)
    share = (num_layers - (first or 0) - (last or 0)) // middle if middle else 0
    return [n for n in (first,) if n is not None] + [share] * middle + [n for n in (last,) if n is not None]


@dataclass(frozen=True, kw_only=True)
class StageLayout:
    """Spreads the layers of a decoder over pipeline stages.

    Args:
        num_layers: decoder layers.
        pipe: P, pipeline ranks.
        virtual: V, chunks of layers that each rank holds.
        first: layers of the first rank; None: as many as the others.
        last: layers of the last rank; None: as many as the others.

    Raises:
        ConfigError: the layers cannot be cut so.
    """

    num_layers: int
    pipe: int = 1
    virtual: int = 1
    first: int | None = None
    last: int | None = None

    def __post_init__(self) -> None:
        problem = stage_problem(
            num_layers=self.num_layers,
            pipe=self.pipe,
            virtual=self.virtual,
            first=self.first,
            last=self.last,
        )
        if problem is not None:
            raise ConfigError([problem])

    @property
    def num_stages(self) -> int:
        """Number of stages that a token passes: P V."""
        return self.pipe * self.virtual

    def stage(self, rank: int, chunk: int) -> int:
        """Number the stage that is chunk ``chunk`` of pipeline rank ``rank``."""
        return chunk * self.pipe + rank

    def place(self, stage: int) -> tuple[int, int]:
        """Find the pipeline rank of a stage, and which of its chunks it is."""
        chunk, rank = divmod(stage, self.pipe)
        return rank, chunk

    def layers_of(self, rank: int, chunk: int) -> range:
        """List the global numbers of the layers in chunk ``chunk`` of pipeline rank ``rank``."""
        sizes = self._layers_per_chunk
        start = chunk * sum(sizes) + sum(sizes[:rank])
        return range(start, start + sizes[rank])

    def stage_of_layer(self, layer: int) -> int:
        """Find the stage that holds a layer, by the layer's global number."""
        for stage in range(self.num_stages):
            if layer in self.layers_of(*self.place(stage)):
                return stage
        raise ValueError(f"layer {layer} is none of {self.num_layers}")

    @property
    def _layers_per_chunk(self) -> list[int]:
        sizes = _layers_of_ranks(self.num_layers, self.pipe, self.first, self.last)
        return [size // self.virtual for size in sizes]
