"""Name models and layouts of tensor and context ranks, and do several updates on any ranks or on one process."""

from dataclasses import dataclass
from typing import Any

from tests.helpers.block_models import MODELS
from tests.helpers.several_updates import ADAM

__all__ = [
    "BRANCH",
    "C2",
    "C2T2",
    "C2T2X2",
    "GPT",
    "GROUPED",
    "HALVES",
    "LATENT",
    "LOSSES",
    "PAIRS",
    "QUANTILE",
    "T2",
    "T2X2",
    "T4",
    "ZERO1",
    "ZERO3",
    "Job",
    "do",
    "is_time",
    "numbers_of_ranks",
    "several_updates",
    "updates_of_jobs",
    "validated",
]

# Stock's blocks; nothing is dropped.
GPT = (
    "--moe-freq", 0, "--moe-expert-count", 0, "--moe-second-expert-policy", "sampling", "--moe-gate-loss-wt", 1,
    "--num-experts", 8, "--moe-layer-freq", "[0,1]", "--moe-aux-loss-coeff", 0.2,
)  # fmt: skip
LOSSES = (
    *GPT, "--moe-router-load-balancing-type", "aux_loss seq_aux_loss global_aux_loss", "--moe-aux-loss-coeff",
    "0.2 0.1 0.3", "--moe-z-loss-coeff", 0.1,
)  # fmt: skip
QUANTILE = (
    *GPT,
    "--moe-router-load-balancing-type",
    "quantile_balancing",
    "--moe-router-score-function",
    "sigmoid",
)
LATENT = (*MODELS["latent"], "--mtp-layers", 0, "--mtp-loss-weight", 0, "--decoder-attention-heads", 4)
GROUPED = (*MODELS["grouped"], "--qk-norm", "full")
BRANCH = (  # two experts never drop
    "--moe-expert-count", 2, "--moe-gate-loss-transform", "neg_log", "--moe-eval-capacity-token-fraction", 1.0,
)  # fmt: skip

PAIRS = ("--expert-model-parallel-size", 2)
HALVES = ("--expert-tensor-parallel-size", 2)
T2X2 = ("--tensor-model-parallel-size", 2, "--sequence-parallel", *HALVES)
T2 = (*T2X2, "--expert-tensor-parallel-size", 1)
T4 = (*T2, "--tensor-model-parallel-size", 4)
C2 = ("--context-parallel-size", 2)
C2T2, C2T2X2 = (*C2, *T2), (*C2, *T2X2)
ZERO1, ZERO3 = ("--use-distributed-optimizer",), ("--use-torch-fsdp2",)


@dataclass(frozen=True, kw_only=True)
class Job:
    """Describe some updates.

    Args:
        model: flags of the ranks and of one process.
        layout: flags of the ranks alone.
        data: ranks that take turns with the batches.
        is_double: the model is made float64.
        num_padded: padding tokens of each batch.
    """

    model: tuple[Any, ...]
    layout: tuple[Any, ...] = ()
    data: int = 1
    is_double: bool = True
    num_padded: int = 0

    @property
    def num_reference_ranks(self) -> int:
        """Ranks without axes that must get the same: one.

        But the global balance loss looks at what all ranks have counted so far, so there each data rank is one.
        """
        return self.data if any("global_aux_loss" in str(flag) for flag in self.model) else 1

    @property
    def reference(self) -> "Job":
        """What ranks without axes do to get the same."""
        return Job(model=self.model, data=self.data, is_double=self.is_double, num_padded=self.num_padded)


LENGTHS = (13, 9, 5, 1, 8, 2)
NUM_UPDATES = 3


def batches_of(job: Job, update: int, data_rank: int) -> list[Any]:
    """Two batches of unequal size; data rank 1 lacks the second in the second update, and both in the third."""
    from tests.helpers.tiny import make_batch

    missing = {1: 1, 2: 2}.get(update, 0) if data_rank == 1 else 0
    numbers = [4 * update + 2 * data_rank + micro for micro in range(2)]
    made = [
        make_batch(
            number,
            num_sequences=1 + number % 3,
            length=LENGTHS[number % len(LENGTHS)],
            num_padded=min(job.num_padded, LENGTHS[number % len(LENGTHS)] - 1),
        )
        for number in numbers
    ]
    return [*made[: 2 - missing], *([None] * missing)]


def several_updates(trainer: Any, job: Job) -> list[dict[str, float]]:
    """Do three updates; what each logs, {} where it was skipped."""
    from fairseq_moe.distributed import world_size
    from tests.helpers.tiny import update

    is_alone = world_size() == 1
    ranks = range(job.data) if is_alone else [trainer.data_parallel_rank]
    trainer.reset_dummy_batch(batches_of(job, 0, 0)[1])
    logged = []
    for number in range(NUM_UPDATES):
        batches = [batch for rank in ranks for batch in batches_of(job, number, rank)]
        if is_alone:
            batches = [batch for batch in batches if batch is not None]
        logged.append(update(trainer, batches))
    return logged


def validated(trainer: Any, job: Job) -> dict[str, float]:
    """Evaluate three batches of each data rank; the last rank lacks the last one."""
    from fairseq.logging import metrics

    from fairseq_moe.distributed import world_size
    from tests.helpers.tiny import make_batch

    is_alone = world_size() == 1
    ranks = range(job.data) if is_alone else [trainer.data_parallel_rank]
    trainer.get_model().eval()
    trainer.get_criterion().eval()
    metrics.reset()
    with metrics.aggregate("checked", new_root=True):
        for number in range(3):
            for rank in ranks:
                has_data = rank == 0 or number < 2
                if has_data:
                    length = LENGTHS[number + rank]
                    padded = min(job.num_padded, length - 1)
                    seed = 50 + 10 * number + rank
                    batch = make_batch(seed, num_sequences=2, length=length, num_padded=padded)
                    trainer.valid_step(batch)
                elif not is_alone:
                    trainer.valid_step(None)
    meters = metrics.get_meters("checked")
    # Counts of batches are those of a step: of all ranks together, or of one after the other.
    counts = ("wpb", "bsz")
    return {
        name: float(meter.avg)
        for name, meter in meters.items()
        if hasattr(meter, "avg") and name not in counts
    }


def do(job: Job) -> dict[str, Any]:
    """Updates, a validation between the second and the third's end; logs, numbers of the validation and parameters."""
    import torch

    from tests.helpers.tiny import build_trainer, parameters

    dtype = torch.float64 if job.is_double else torch.float32
    trainer = build_trainer([*ADAM, *job.model, *job.layout], dtype=dtype)
    logged = several_updates(trainer, job)
    return {"logged": logged, "validated": validated(trainer, job), "parameters": parameters(trainer)}


def updates_of_jobs(rank: int, jobs: list[Job]) -> list[dict[str, Any]]:
    """Do each job in turn, on the ranks that are there."""
    return [do(job) for job in jobs]


def is_time(name: str) -> bool:
    """Tell whether a logged number says how long something took."""
    return "time" in name or name in ("ups", "wps", "wall", "train_wall", "ups", "gb_free")


def numbers_of_ranks(found: dict[str, float]) -> dict[str, float]:
    """Leave out times."""
    return {name: value for name, value in found.items() if not is_time(name)}
