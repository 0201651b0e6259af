"""Do the mappings of the Megatron guides build, place and schedule every rank? At full size, without a GPU or memory.

    python scripts/reference_mappings.py [--every-rank]

Mixtral 8x7B with TP1 EP8 PP4 VP8 on 64 ranks, and 8x22B with TP4 EP2 PP8 VP7 on 128. Models are built on torch's meta
device, which holds no numbers, rank after rank in one process whose process group is a fake: one rank of each pipeline
stage and tensor place, or every rank. Prints a Markdown table; ends with exit code 1 where the parameters of all ranks,
copies counted once, are not those of the published model.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")


ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, kw_only=True)
class Mapping:
    """Describe how a published model is spread.

    Args:
        arch: of ``--arch``.
        ranks: how many.
        flags: what spreads it.
        update_freq: micro-batches of an update, of one sequence each, for the guides' 256 sequences.
    """

    arch: str
    ranks: int
    flags: str
    update_freq: int


MAPPINGS = (
    Mapping(
        arch="mixtral_8x7b",
        ranks=64,
        flags="--pipeline-model-parallel-size 4 --num-virtual-stages-per-pipeline-rank 8 "
        "--expert-model-parallel-size 8",
        update_freq=16,
    ),
    Mapping(
        arch="mixtral_8x22b",
        ranks=128,
        flags="--pipeline-model-parallel-size 8 --num-virtual-stages-per-pipeline-rank 7 "
        "--tensor-model-parallel-size 4 --sequence-parallel --expert-model-parallel-size 2",
        update_freq=64,
    ),
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """Hold what was found of a mapping.

    Args:
        mapping: built.
        built: numbers of the ranks whose models were built.
        layers: of each stage of the pipeline, by pipeline rank and virtual stage.
        parameters: the fewest and the most on a rank.
        experts: on a rank, of each layer.
        expert_parts: over how many ranks the width of an expert is divided.
        total: parameters of all ranks, copies counted once.
        published: those of the model.
        steps: the length of each pipeline rank's schedule: passes, and what is sent and received.
        bubble: the share of an update in which a rank idles.
    """

    mapping: Mapping
    built: list[int]
    layers: list[list[int]]
    parameters: tuple[int, int]
    experts: int
    expert_parts: int
    total: Fraction
    published: int
    steps: list[int]
    bubble: Fraction

    @property
    def line(self) -> str:
        """Write the line of the table."""
        lengths = sorted({length for chunks in self.layers for length in chunks})
        fewest, most = (number / 1e9 for number in self.parameters)
        experts = f"{self.experts}" + (f" (1/{self.expert_parts} each)" if self.expert_parts > 1 else "")
        cells = (
            self.mapping.arch,
            self.mapping.ranks,
            f"{len(self.layers)} x {len(self.layers[0])}",
            "-".join(map(str, lengths)),
            f"{fewest:.2f}-{most:.2f}",
            experts,
            f"{int(self.total):,}",
            f"{self.published:,}",
            self.mapping.update_freq,
            f"{min(self.steps)}-{max(self.steps)}",
            f"{float(self.bubble):.1%}",
        )
        return f"| {' | '.join(map(str, cells))} |"


_COLUMNS = (
    "model",
    "ranks",
    "stages",
    "layers of each",
    "1e9 parameters of a rank",
    "experts of a rank",
    "parameters of all",
    "published",
    "micro-batches",
    "steps of a rank",
    "bubble",
)
HEADER = f"| {' | '.join(_COLUMNS)} |\n|---{'|--:' * (len(_COLUMNS) - 1)}|"


def measure(mapping: Mapping, *, every_rank: bool = False) -> Row:
    """Build, place and schedule the ranks of a mapping; there must be no process group."""
    from fairseq_moe.distributed import parallel_mesh
    from fairseq_moe.distributed.pretended import pretended_rank
    from fairseq_moe.flags.moe import MoEConfig
    from fairseq_moe.models.presets import PRESETS
    from fairseq_moe.parallel.schedule import bubble_frac, lowered
    from fairseq_moe.planner.built import build_on_meta

    preset, args = PRESETS[mapping.arch], _parsed(mapping)
    moe = MoEConfig.from_args(args)
    layout = moe.parallel.stages(args.decoder_layers)
    built, sizes, total = [], [], Fraction(0)
    experts = parts = 0
    for rank in range(mapping.ranks):
        with pretended_rank(rank, mapping.ranks):
            mesh = parallel_mesh(args.num_experts, **moe.axes._asdict())
            ranks = mesh.ranks
            if not every_rank and any(ranks.coordinate(rank, axis) for axis in ("data", "context")):
                continue
            model = build_on_meta(args, num_words=preset.vocab_size, padding=preset.vocab_size)
            own = _with_copies_counted_once(model, mesh)
            built.append(rank)
            sizes.append(sum(parameter.numel() for parameter in model.parameters()))
            total += own if every_rank else own * ranks.data * ranks.context
            experts, parts = len(mesh.layout.local_ids(rank)), ranks.expert_tensor
            held = [index for index, layer in enumerate(model.decoder.layers) if layer is not None]
            stage = model.decoder.stage
            assert held == sorted(index for chunk in stage.chunks for index in chunk), f"rank {rank}: {held}"
    return Row(
        mapping=mapping,
        built=built,
        layers=[
            [len(layout.layers_of(pipe, virtual)) for virtual in range(layout.virtual)]
            for pipe in range(layout.pipe)
        ],
        parameters=(min(sizes), max(sizes)),
        experts=experts,
        expert_parts=parts,
        total=total,
        published=preset.num_parameters,
        steps=[len(steps) for steps in lowered(layout.pipe, layout.virtual, mapping.update_freq)],
        bubble=bubble_frac(layout.pipe, layout.virtual, mapping.update_freq),
    )


def _with_copies_counted_once(model: Any, mesh: Any) -> Fraction:
    from fairseq_moe.models.sizes import counted_here
    from fairseq_moe.parallel.placement import num_copies, placement_of

    counted = counted_here(model.parameters(), mesh)
    parts = (Fraction(p.numel(), num_copies(placement_of(p), mesh.ranks)) for p in counted)
    return sum(parts, Fraction(0))


def _parsed(mapping: Mapping) -> argparse.Namespace:
    from fairseq import options

    import fairseq_moe  # noqa: F401

    argv = ["--task", "dummy_lm", "--criterion", "moe_cross_entropy", "--tokens-per-sample", "4096"]
    argv += ["--arch", mapping.arch, *mapping.flags.split()]
    args: argparse.Namespace = options.parse_args_and_arch(options.get_training_parser(), argv)
    args.max_target_positions = 4096
    return args


def rows(mappings: Sequence[Mapping] = MAPPINGS, *, every_rank: bool = False) -> Iterator[Row]:
    """Measure one mapping after the other."""
    for mapping in mappings:
        yield measure(mapping, every_rank=every_rank)


def main() -> int:
    """Print the table; the exit code is 1 where parameters are missing or too many."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--every-rank", action="store_true", help="build the model of every rank, which takes minutes"
    )
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    print(HEADER, flush=True)
    is_wrong = False
    for row in rows(every_rank=options.every_rank):
        print(row.line, flush=True)
        is_wrong |= row.total != row.published
    return int(is_wrong)


if __name__ == "__main__":
    sys.exit(main())
