"""--moe-freeze-modules: what is named stays equal to the bit, everything else is trained, and a resumed run goes on."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.ranks import run_cli, run_ranks

MEGATRON = [
    "--moe-freq", 0, "--moe-expert-count", 0, "--num-experts", 4, "--moe-router-topk", 2,
    "--moe-router-score-function", "sigmoid", "--moe-router-enable-expert-bias",
    "--moe-aux-loss-coeff", 0.01, "--moe-gate-loss-wt", 1.0,
]  # fmt: skip


def changed_parts(rank: int, save_dir: str, flags: list[Any]) -> tuple[set[str], bool]:
    """Train, save, load and train; returns the parts that moved, and whether the rest has moved in every update."""
    from tests.helpers.saves import TinyRun

    def parts(run: Any) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in run.trainer.get_model().state_dict().items()}

    run = TinyRun(Path(save_dir), *MEGATRON, *flags)
    before = parts(run)
    run.train(2)
    run.save()
    again = TinyRun(Path(save_dir), *MEGATRON, *flags)
    again.load()
    assert all(torch.equal(value, parts(run)[name]) for name, value in parts(again).items())
    again.train(1)
    after, middle = parts(again), parts(run)
    kinds = {"router.weight": "router", "expert_bias": "router", "experts.": "experts"}
    moved = {
        next((kind for part, kind in kinds.items() if part in name), "dense")
        for name, value in after.items()
        if not torch.equal(value, before[name])
    }
    dense = (
        "decoder.layers.0.fc1.weight"
        if "decoder.layers.0.fc1.weight" in after
        else "decoder.embed_tokens.weight"
    )
    return moved, not torch.equal(after[dense], middle[dense])


@pytest.mark.parametrize("backend", ["legacy_ddp", "pytorch_ddp"])
@pytest.mark.parametrize(
    ("frozen", "moved"),
    [
        ("", {"router", "experts", "dense"}),
        ("routers", {"experts", "dense"}),
        ("experts", {"router", "dense"}),
        ("routers,experts", {"dense"}),
    ],
)
def test_only_what_is_not_named_moves(frozen: str, moved: set[str], backend: str, tmp_path: Path) -> None:
    flags = ["--ddp-backend", backend, *(["--moe-freeze-modules", frozen] if frozen else [])]
    for found in run_ranks(changed_parts, 2, str(tmp_path), flags):
        assert found == (moved, True)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--moe-freeze-modules", "gates"], "expected one or both of routers, experts"),
        (
            ["--moe-freeze-modules", "experts", "--moe-freq", 0, "--moe-expert-count", 0],
            "needs layers with experts",
        ),
        (
            ["--moe-freeze-modules", "experts", "--ddp-backend", "fully_sharded"],
            "use --use-torch-fsdp2 in its place, legacy_ddp or pytorch_ddp",
        ),
    ],
)
def test_what_cannot_be_frozen_is_refused(flags: list[Any], sentence: str, tmp_path: Path) -> None:
    from tests.e2e.commands import train_argv

    found = run_cli("fairseq_cli.train", train_argv(tmp_path / "no data", tmp_path / "save", *flags))
    assert found.exit_code == 2
    assert sentence in found.output
