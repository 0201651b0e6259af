"""Does each layout of ranks give the gradients of one process? Measured on this machine's CPU, in about two minutes.

    python scripts/layout_parity.py [--layouts NAME ...] [--json FILE]

For each layout so many ranks do one update of stock fairseq's Trainer on a tiny model, each on micro-batches of other
lengths. The reference is one process that takes all of their micro-batches as those of --update-freq. Prints a Markdown
table with the largest relative difference of a parameter's gradient, on any rank, and those of the logged loss and
norm; ends with exit code 1 and a sentence per layout that is above its bound.

A difference is the norm of the difference by the norm of the reference, or by a thousandth of the norm of all gradients
where that is more: the true gradient of a key's bias is zero. The reference computes in float64. The balance loss takes
part, and no token is dropped.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from layout_ranks import Job, Report, preload, run_jobs
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]

_BRANCH = "--moe-freq 2 --moe-second-expert-policy all --moe-gate-loss-wt 0.1 --moe-expert-count"
_MEGATRON = "--moe-gate-loss-wt 1 --moe-aux-loss-coeff 0.2 --num-experts"
_BLOCKS = f"""
    {_MEGATRON} 4 --moe-ffn-hidden-size 6 --moe-layer-freq [0,1,1] --decoder-layers 3 --decoder-embed-dim 12
    --decoder-normalization rmsnorm --position-embedding rope --gated-ffn --no-scale-embedding --init-std 0.3
    --kv-lora-rank 10 --q-lora-rank 6 --qk-nope-head-dim 4 --qk-rope-head-dim 2 --v-head-dim 5 --attention-bias none
    --moe-router-score-function sigmoid --moe-shared-expert-intermediate-size 6
"""
_GROUPED = f"""
    {_MEGATRON} 4 --moe-ffn-hidden-size 8 --moe-layer-freq [0,1,1] --decoder-layers 3 --decoder-embed-dim 12
    --decoder-attention-heads 4 --decoder-kv-heads 2 --decoder-normalization rmsnorm --position-embedding rope
    --gated-ffn --attention-bias qkv --qk-norm full --init-std 0.3
"""
_LATENT = f"{_BLOCKS} --decoder-attention-heads 4"
_MTP = "--mtp-layers 1 --mtp-loss-weight 0.3"
# What balance losses and biases look at, beyond the plain one.
_LOSSES = """
    --moe-router-load-balancing-type aux_loss seq_aux_loss global_aux_loss --moe-aux-loss-coeff 0.2 0.1 0.3
    --moe-z-loss-coeff 0.1
"""
# Flags of the reference as well.
MODELS = {
    "4 experts": f"{_BRANCH} 4",
    "2 experts": f"{_BRANCH} 2",
    "8 experts": f"{_MEGATRON} 8 --moe-layer-freq [0,1]",
    "latent attention, MTP, 4 experts": f"{_BLOCKS} {_MTP}",
    "latent attention, 4 experts": _LATENT,
    "grouped attention, 4 experts": _GROUPED,
    "4 layers, 4 experts": f"{_GROUPED} --decoder-layers 4 --moe-layer-freq [0,1,0,1] {_LOSSES}",
    "4 layers, plain losses, 4 experts": f"{_GROUPED} --decoder-layers 4 --moe-layer-freq [0,1,0,1]",
    "8 layers, 4 experts": f"{_GROUPED} --decoder-layers 8 --moe-layer-freq [0,1]*4",
    "32 layers, 4 experts": f"{_GROUPED} --decoder-layers 32 --moe-layer-freq 1",
    "14 layers, 4 experts": f"{_GROUPED} --decoder-layers 14 --moe-layer-freq 1",
    "GPT, 4 layers, 4 experts": f"{_MEGATRON} 4 --decoder-layers 4 --moe-layer-freq [1,0,1,1]",
    "all losses, 8 experts": f"{_MEGATRON} 8 --moe-layer-freq [0,1] {_LOSSES}",
}

_LEGACY, _TORCH = "--ddp-backend legacy_ddp", "--ddp-backend pytorch_ddp"
_FAIRSCALE = "--ddp-backend fully_sharded"
_ZERO1, _ZERO3 = "--use-distributed-optimizer", "--use-torch-fsdp2"
_TWICE = "--update-freq 2 --checkpoint-activations"
_ALL_EACH = "--expert-model-parallel-size 1"
_HALVES = "--expert-tensor-parallel-size 2"
_GATHER = "--moe-token-dispatcher-type allgather"
_PAIRS = "--expert-model-parallel-size 2"
_WHOLE = "--expert-tensor-parallel-size 1"
_T2 = "--tensor-model-parallel-size 2 --sequence-parallel"
_T4 = "--tensor-model-parallel-size 4 --sequence-parallel"
_C2 = "--context-parallel-size 2"
_PIPE = "--pipeline-model-parallel-size"
_P2, _P4 = f"{_PIPE} 2 --update-freq 2", f"{_PIPE} 4 --update-freq 2"
_VIRTUAL = "--num-virtual-stages-per-pipeline-rank"
_V2 = f"{_P2} {_VIRTUAL} 2"
_PLAIN = "4 layers, plain losses, 4 experts"  # global_aux_loss counts micro-batches in the order of each rank
_DEEP, _DEEP_GPT, _MTP_4 = (
    "4 layers, 4 experts",
    "GPT, 4 layers, 4 experts",
    "latent attention, MTP, 4 experts",
)
_GPT, _LATENT_4, _GROUPED_4 = "8 experts", "latent attention, 4 experts", "grouped attention, 4 experts"


@dataclass(frozen=True)
class Layout:
    """Describe a way to spread a model over ranks.

    Args:
        backend: names it in the table.
        ranks: how many.
        model: a key of ``MODELS``.
        flags: what concerns the ranks, and not the reference.
        is_double: False where the backend computes in float32 whatever the model is.
    """

    backend: str
    ranks: int
    model: str
    flags: str
    is_double: bool = True

    @property
    def name(self) -> str:
        """Name the layout in the table."""
        return f"{self.backend}, {self.ranks} ranks, {self.model}"

    def number(self, flag: str) -> int:
        """Read the first number that the flags give for ``flag``; 1 where they do not."""
        words = self.flags.split()
        return int(words[words.index(flag) + 1]) if flag in words else 1

    @property
    def shards(self) -> int:
        """Count the ranks that read the same micro-batches."""
        return math.prod(map(self.number, ("--tensor-model-parallel-size", "--context-parallel-size", _PIPE)))

    def data_rank(self, rank: int) -> int:
        """Number the ranks that take turns with the batches: rank = ((p D + d) C + c) T + t."""
        stages = self.number(_PIPE)
        return rank % (self.ranks // stages) // (self.shards // stages)

    @property
    def bound(self) -> float:
        """Bound each relative difference; float32 rounds gradients that are truly zero to 5e-9 of the global norm."""
        return 1e-12 if self.is_double else 1e-5


_ROWS = (
    Layout("legacy_ddp", 2, "4 experts", _LEGACY),
    Layout("pytorch_ddp", 2, "4 experts", _TORCH),
    Layout("fully_sharded", 2, "4 experts", _FAIRSCALE, is_double=False),
    Layout("ZeRO-1", 2, "4 experts", _ZERO1),
    Layout("ZeRO-3", 2, "4 experts", _ZERO3),
    Layout("legacy_ddp, experts in halves", 2, "4 experts", f"{_LEGACY} {_HALVES}"),
    Layout("legacy_ddp", 4, "4 experts", _LEGACY),
    Layout("legacy_ddp, experts held twice", 4, "2 experts", _LEGACY),
    Layout("pytorch_ddp, experts held twice", 4, "2 experts", _TORCH),
    Layout("fully_sharded, experts held twice", 4, "2 experts", _FAIRSCALE, is_double=False),
    Layout("ZeRO-1, experts held twice", 4, "2 experts", _ZERO1),
    Layout("ZeRO-3, experts held twice", 4, "2 experts", _ZERO3),
    Layout("pytorch_ddp, expert groups of 2", 4, "8 experts", f"{_TORCH} {_PAIRS}"),
    Layout("ZeRO-1, expert groups of 2", 4, "8 experts", f"{_ZERO1} {_PAIRS}"),
    Layout("ZeRO-3, expert groups of 2", 4, "8 experts", f"{_ZERO3} {_PAIRS}"),
    Layout("ZeRO-1, 2 micro-batches, recomputing", 4, "4 experts", f"{_ZERO1} {_TWICE}"),
    Layout("ZeRO-3, 2 micro-batches, recomputing", 4, "2 experts", f"{_ZERO3} {_TWICE}"),
    Layout("ZeRO-3", 4, "latent attention, MTP, 4 experts", _ZERO3),
    Layout("pytorch_ddp, halves, expert groups of 2", 4, "8 experts", f"{_TORCH} {_PAIRS} {_HALVES}"),
    Layout(
        "allgather, halves, expert groups of 2", 4, "8 experts", f"{_LEGACY} {_PAIRS} {_HALVES} {_GATHER}"
    ),
    Layout("ZeRO-1, halves held twice", 4, "8 experts", f"{_ZERO1} {_ALL_EACH} {_HALVES}"),
    Layout("ZeRO-3, halves held twice", 4, "8 experts", f"{_ZERO3} {_ALL_EACH} {_HALVES}"),
    Layout("ZeRO-3, gated halves", 4, "latent attention, MTP, 4 experts", f"{_ZERO3} {_HALVES}"),
    Layout("T2 E2", 2, _GPT, f"{_T2} {_WHOLE}"),
    Layout("T2 E2", 2, _LATENT_4, f"{_T2} {_WHOLE}"),
    Layout("T2 E2, 2 micro-batches, recomputing", 2, _GROUPED_4, f"{_T2} {_WHOLE} {_TWICE}"),
    Layout("T2 X2", 2, _GROUPED_4, _T2),
    Layout("T2 X2, allgather", 2, _GPT, f"{_T2} {_GATHER}"),
    Layout("C2 E2", 2, _GPT, _C2),
    Layout("C2 E2, 2 micro-batches, recomputing", 2, _LATENT_4, f"{_C2} {_TWICE}"),
    Layout("C2 E2", 2, _GROUPED_4, _C2),
    Layout("T2 E2", 2, "all losses, 8 experts", f"{_T2} {_WHOLE}"),
    Layout("C2 T2 E4", 4, _GROUPED_4, f"{_C2} {_T2} {_WHOLE}"),
    Layout("C2 T2 E2 X2", 4, _LATENT_4, f"{_C2} {_T2}"),
    Layout("C2 T2 E4", 4, "all losses, 8 experts", f"{_C2} {_T2} {_WHOLE}"),
    Layout("D2 T2 E4", 4, _GPT, f"{_T2} {_WHOLE}"),
    Layout("D2 T2 E2 X2, ZeRO-1", 4, _LATENT_4, f"{_T2} {_ZERO1}"),
    Layout("D2 T2 E2 X2, ZeRO-3", 4, _GROUPED_4, f"{_T2} {_ZERO3}"),
    Layout("D2 C2 E2, ZeRO-1", 4, _LATENT_4, f"{_C2} {_PAIRS} {_ZERO1}"),
    Layout("D2 C2 E2, ZeRO-3", 4, _GPT, f"{_C2} {_PAIRS} {_ZERO3}"),
    Layout("T4 E4", 4, _LATENT_4, f"{_T4} {_WHOLE}"),
    Layout("extended tp: T2 X4", 4, _GROUPED_4, f"{_T2} {_PAIRS} --moe-extended-tp"),
    Layout("extended ep: T2 E4", 4, _GPT, f"{_T2} {_PAIRS} --moe-extended-ep"),
    Layout("D2 C2 E2 X2", 4, _GPT, f"{_C2} {_PAIRS} {_HALVES}"),
    Layout("P2", 2, _GPT, _P2),
    Layout("P2, uneven stages", 2, _GROUPED_4, f"{_P2} --decoder-first-pipeline-num-layers 1"),
    Layout(
        "P2, recomputing", 2, _MTP_4, f"{_P2} --decoder-first-pipeline-num-layers 2 --checkpoint-activations"
    ),
    Layout("P2 V2", 2, _DEEP_GPT, _V2),
    Layout("P2 T2 E2", 4, _DEEP, f"{_P2} {_T2} {_WHOLE}"),
    Layout("P2 D2, ZeRO-1", 4, _PLAIN, f"{_P2} {_ZERO1}"),
    Layout("P2 V2 D2, ZeRO-3", 4, _DEEP_GPT, f"{_V2} {_ZERO3}"),
    Layout("P4", 4, _DEEP, _P4),
    Layout("P2 V2 T2 X2", 4, _DEEP, f"{_V2} {_T2}"),
    Layout("P2 C2 E2", 4, _DEEP_GPT, f"{_P2} {_C2}"),
    Layout("P2 D2 C2 E2, ZeRO-3", 8, _PLAIN, f"{_P2} {_C2} {_PAIRS} {_ZERO3}"),
    Layout("P2 V2 C2 T2 E2 X2", 8, _DEEP, f"{_V2} {_C2} {_T2}"),
    Layout("P4 V2 D2", 8, "8 layers, 4 experts", f"{_P4} {_VIRTUAL} 2 --update-freq 4"),
    # Reference mappings of the Megatron guides, shrunk: Mixtral 8x7B's P4 V8 E8, and 8x22B's P8 V7 T4 E2 with X = T.
    Layout("P4 V8 D2 E2", 8, "32 layers, 4 experts", f"{_P4} {_VIRTUAL} 8 --update-freq 4 {_PAIRS}"),
    Layout("P2 V7 D2 T2 E2 X2", 8, "14 layers, 4 experts", f"{_P2} {_VIRTUAL} 7 {_T2} {_PAIRS}"),
    Layout("D2 C2 T2 E4 X2, ZeRO-1", 8, _GROUPED_4, f"{_C2} {_T2} {_ZERO1}"),
)
# Those with the same number of ranks stand together: their ranks are started once.
LAYOUTS = tuple(sorted(_ROWS, key=lambda row: row.ranks))

# Of one rank after the other. Four experts drop none of these tokens (found by trying, and checked in each run), two
# never do, and Megatron's routing has no capacity here.
_BATCHES = ((3, 1, 9), (19, 2, 3), (38, 3, 3), (54, 1, 5), (19, 1, 13), (38, 1, 6), (54, 2, 5), (3, 1, 10))
_BALANCE = ("moe_gate_loss", "moe_aux_loss")  # the branch's, and Megatron's
_LEAST_FRAC = 1e-3  # of the global norm


@dataclass(frozen=True, kw_only=True)
class Parity:
    """Hold the relative differences of one layout from one process.

    Args:
        layout: compared.
        gradient: the largest one of a gradient, on any rank.
        parameter: whose gradient that is.
        loss: of the logged loss.
        gnorm: of the logged norm of all gradients.
        failure: the ranks' tracebacks, where there is nothing to compare.
    """

    layout: Layout
    gradient: float = math.inf
    parameter: str = ""
    loss: float = math.inf
    gnorm: float = math.inf
    failure: str = ""

    @property
    def row(self) -> str:
        """Write the line of the table."""
        found = (self.gradient, self.loss, self.gnorm)
        numbers = ("failed" if self.failure else f"{number:.1e}" for number in found)
        dtype = "float64" if self.layout.is_double else "float32"
        cells = (self.layout.name, dtype, *numbers, f"{self.layout.bound:.0e}", self.parameter)
        return f"| {' | '.join(cells)} |"

    @property
    def record(self) -> dict[str, Any]:
        """List everything, for JSON, which has no infinity."""
        values = {key: None if value == math.inf else value for key, value in asdict(self).items()}
        return {"name": self.layout.name, "bound": self.layout.bound, **values}

    @property
    def complaint(self) -> str:
        """Say in one sentence what is above the bound; empty if nothing is."""
        name, bound = self.layout.name, self.layout.bound
        if self.failure:
            return f"{name}: the ranks failed, as printed above."
        found = {f"the gradient of {self.parameter}": self.gradient, "loss": self.loss, "gnorm": self.gnorm}
        above = [f"{what} by {number:.1e}" for what, number in found.items() if number > bound]
        return f"{name} differs from one process in {', '.join(above)}, above {bound:.0e}." if above else ""


HEADER = """\
| layout | computes in | gradients | loss | gnorm | bound | largest at |
|---|---|--:|--:|--:|--:|---|"""


def measure(layouts: Sequence[Layout], prepare: Callable[[], None] | None = None) -> Iterator[Parity]:
    """Compare each layout with one process.

    Args:
        layouts: in the order of ``LAYOUTS``.
        prepare: called on every rank of the layouts, not in the reference, before its first update.
    """
    references = _references(layouts)
    for _, rows in groupby(layouts, lambda layout: layout.ranks):
        group = list(rows)
        reports = run_jobs([_job(each) for each in group], prepare=prepare)
        for layout, found in zip(group, reports, strict=True):
            yield _compared(layout, found, references[_alone(layout)])


def _job(layout: Layout) -> Job:
    data_ranks, micro_batches = layout.ranks // layout.shards, range(layout.number("--update-freq"))
    return Job(
        flags=(*MODELS[layout.model].split(), *layout.flags.split()),
        batches=tuple(
            tuple(_BATCHES[layout.data_rank(rank) + data_ranks * micro] for micro in micro_batches)
            for rank in range(layout.ranks)
        ),
        is_double=layout.is_double,
    )


def _alone(layout: Layout) -> Job:
    """Describe the same update on one process."""
    of_data_rank = {layout.data_rank(rank): own for rank, own in enumerate(_job(layout).batches)}
    batches = tuple(batch for own in of_data_rank.values() for batch in own)
    return Job(flags=tuple(MODELS[layout.model].split()), batches=(batches,), is_double=True)


def _references(layouts: Sequence[Layout]) -> dict[Job, Report]:
    """Do each update on one process, once for all layouts that share it."""
    jobs = list(dict.fromkeys(_alone(layout) for layout in layouts))
    references = {}
    for job, found in zip(jobs, run_jobs(jobs), strict=True):
        if isinstance(found, str):
            raise SystemExit(f"{found}\nThe update on one process failed; nothing can be compared with it.")
        (references[job],) = found
    return references


def _compared(layout: Layout, found: list[Report] | str, reference: Report) -> Parity:
    if isinstance(found, str):
        return Parity(layout=layout, failure=found)
    for report in (*found, reference):
        assert report.logged["drop_rate"] == 0, f"{layout.name}: tokens were dropped; choose other batches"
        assert any(report.logged.get(name, 0) > 0 for name in _BALANCE), f"{layout.name}: no balance loss"
    largest, name = max(_differences(found, reference))
    return Parity(
        layout=layout,
        gradient=largest,
        parameter=name,
        loss=_worst_number("loss", found, reference),
        gnorm=_worst_number("gnorm", found, reference),
    )


def _differences(found: list[Report], reference: Report) -> Iterator[tuple[float, str]]:
    """Compare every parameter on each rank that has it; infinite for one that no rank has."""
    least = _LEAST_FRAC * reference.logged["gnorm"]
    for name, expected in reference.gradients.items():
        own = [report.gradients[name].double() for report in found if name in report.gradients]
        scale = max(float(expected.norm()), least)
        yield _largest(_distance(gradient, expected) / scale for gradient in own), name


def _distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm()) if found.shape == expected.shape else math.inf


def _worst_number(name: str, found: list[Report], reference: Report) -> float:
    expected = reference.logged[name]
    return _largest(abs(report.logged[name] - expected) / abs(expected) for report in found)


def _largest(differences: Iterable[float]) -> float:
    return max((each if math.isfinite(each) else math.inf for each in differences), default=math.inf)


def main() -> int:
    """Print the table; the exit code is 1 where a layout is above its bound."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--layouts", nargs="+", metavar="NAME", help="those alone whose names contain one of these"
    )
    parser.add_argument("--json", type=Path, help="also write everything into this file")
    args = parser.parse_args()
    layouts = [
        each for each in LAYOUTS if not args.layouts or any(part in each.name for part in args.layouts)
    ]
    if not layouts:
        parser.error("no layout has such a name; they are " + "; ".join(each.name for each in LAYOUTS))
    _use_this_checkout()
    preload()
    start_sec = time.monotonic()
    about = f"torch {torch.__version__}, on CPU with gloo, one thread per rank, fairseq_moe in {ROOT}"
    print(f"{about}\n\n{HEADER}", flush=True)
    results = []
    for parity in measure(layouts):
        results.append(parity)
        print(parity.row, flush=True)
    print(f"\n{len(results)} layouts in {time.monotonic() - start_sec:.0f} s.")
    if args.json is not None:
        report = {"about": about, "layouts": [parity.record for parity in results]}
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return _complain(results)


def _complain(results: Sequence[Parity]) -> int:
    for parity in results:
        if parity.failure:
            print(f"\n{parity.layout.name}\n{parity.failure}", file=sys.stderr)
    complaints = [parity.complaint for parity in results if parity.complaint]
    print("\n".join(complaints), file=sys.stderr, end="\n" if complaints else "")
    return 1 if complaints else 0


def _use_this_checkout() -> None:
    """Let ranks import the package beside this script, on a CPU, whatever is installed."""
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    sys.path.insert(0, str(ROOT))


if __name__ == "__main__":
    sys.exit(main())
