"""The tools for checkpoints need memory for a tensor, not for a checkpoint: measured in processes of their own."""

import contextlib
import ctypes
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fairseq_moe.checkpoint import ModelShape, ShardContent, write_checkpoint
from fairseq_moe.checkpoint_tools import output
from fairseq_moe.checkpoint_tools.command import main
from tests.helpers.formats import EXPERTS, state
from tests.helpers.ranks import run_ranks

MIB = 1 << 20
_M_MMAP_THRESHOLD = -3  # of mallopt
_NUM_EXPERTS, _EXPERT_DIM, _MODEL_DIM = 8, 512, 512
TENSOR = 4 * _NUM_EXPERTS * _EXPERT_DIM * _MODEL_DIM  # bytes of all experts' fc1 or fc2
CHECKPOINT = 6 * TENSOR  # two such, each with two moments
DENSE = 2 * TENSOR // _NUM_EXPERTS


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a.pt and b.pt, 48 MiB each, in 4 shards."""
    folder = tmp_path_factory.mktemp("large")
    ids = [[2 * index, 2 * index + 1] for index in range(4)]
    fc1 = torch.ones(2, _EXPERT_DIM, _MODEL_DIM)
    model = {f"{EXPERTS}.fc1_weight": fc1, f"{EXPERTS}.fc2_weight": fc1.transpose(1, 2).contiguous()}
    moments = {name: {"exp_avg": tensor, "exp_avg_sq": tensor} for name, tensor in model.items()}
    for name in ("a.pt", "b.pt"):
        write_checkpoint(
            folder / name,
            state=state(moe_freq=1, decoder_layers=1),
            run_id="run",
            update=1,
            shape=ModelShape(
                num_experts=_NUM_EXPERTS, top_k=2, model_dim=_MODEL_DIM, expert_dim=_EXPERT_DIM, num_layers=1
            ),
            contents=[ShardContent(expert_ids=own, model=dict(model), optimizer=moments) for own in ids],
            num_shards=4,
        )
    return folder


def own_bytes() -> int:
    """Memory of this process that is no page of a file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (found,) = (line.split() for line in lines if line.startswith("RssAnon:"))
    return 1024 * int(found[1])


def peak(rank: int, argv: list[str], all_at_once: bool) -> int:
    """By how much the memory of the process grows: looked at whenever a tensor has just been read.

    Args:
        rank: unused.
        argv: of the tool.
        all_at_once: the mutation: the contents are read before the first of them is written.
    """
    # Give freed memory back at once, so that what is counted is what is held.
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 16)
    seen = [own_bytes()]

    @contextlib.contextmanager
    def looking(label: str, num_bytes: int) -> Iterator[Callable[[int], None]]:
        yield lambda done: seen.append(own_bytes())

    output.progress = looking  # type: ignore[assignment]
    if all_at_once:
        split = output.split_content
        output.split_content = lambda *args, **kwargs: [  # type: ignore[assignment]
            _read(part) for part in split(*args, **kwargs)
        ]
    assert main(argv) == 0
    assert len(seen) > 2
    return max(seen) - seen[0]


def _read(content: ShardContent) -> ShardContent:
    def again(value: Any) -> Any:
        tensor = value.load()
        return dataclasses.replace(value, load=lambda: tensor)

    return dataclasses.replace(
        content,
        model={name: again(value) for name, value in content.model.items()},
        optimizer={
            name: {key: again(value) for key, value in values.items()}
            for name, values in content.optimizer.items()
        },
    )


@pytest.mark.parametrize(
    ("tool", "limit"),
    [
        # The tensor that is written, and the next one.
        (["reshard", "a.pt", "--shards", "8"], 2 * TENSOR // 8),
        (["consolidate", "a.pt"], 2 * TENSOR),
        # A tensor of one of four shards in float64, in float32 and as it was read.
        (["average", "a.pt", "b.pt"], 4 * TENSOR // 4),
        # All of the result.
        (["to-dense", "a.pt", "--mean"], 2 * DENSE),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_tools_need_memory_for_a_tensor(tool: list[str], limit: int, large: Path, tmp_path: Path) -> None:
    argv = [str(large / part) if part.endswith(".pt") else part for part in tool]
    (found,) = run_ranks(peak, 1, [*argv, "--to", str(tmp_path / "out.pt")], False)
    assert found < limit + 2 * MIB < CHECKPOINT / 2


def test_the_measure_sees_a_checkpoint_that_is_read_at_once(large: Path, tmp_path: Path) -> None:
    argv = ["consolidate", str(large / "a.pt"), "--to", str(tmp_path / "out.pt")]
    (found,) = run_ranks(peak, 1, argv, True)
    assert found > 0.9 * CHECKPOINT
