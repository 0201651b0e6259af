"""R4: one shard is missing: all ranks refuse within seconds, in the same words, with the experts that are lost."""

import time
from pathlib import Path

import pytest

from tests.helpers.ranks import run_ranks

DEADLINE_SEC = 15.0


def save_and_load_without(rank: int, save_dir: str, index: int) -> tuple[str, float]:
    """Save on four ranks, delete one shard, load; returns what this rank is told, and after how long."""
    from fairseq_moe.distributed import barrier
    from fairseq_moe.errors import CheckpointError
    from tests.helpers.saves import TinyRun

    run = TinyRun(Path(save_dir), "--moe-expert-count", 8)
    run.train(1)
    run.save()
    barrier()
    if rank == 0:
        (shard,) = Path(save_dir).glob(f"shards/*/shard-{index}-of-4.safetensors")
        shard.unlink()
    barrier()
    start_sec = time.monotonic()
    with pytest.raises(CheckpointError) as raised:
        run.load()
    assert raised.value.agreed
    return str(raised.value), time.monotonic() - start_sec


@pytest.mark.parametrize("index", [0, 2])
def test_four_ranks_refuse_together(index: int, tmp_path: Path) -> None:
    results = run_ranks(save_and_load_without, 4, str(tmp_path), index)
    sentences = {sentence for sentence, _ in results}
    assert len(sentences) == 1
    assert max(duration_sec for _, duration_sec in results) < DEADLINE_SEC
    (sentence,) = sentences
    assert (
        f"shard-{index}-of-4.safetensors (experts {2 * index}, {2 * index + 1}, and dense tensors)"
        in sentence
    )
    assert "is missing" in sentence


def load_alone(rank: int, save_dir: str) -> str:
    """Without the guard: each rank looks at its own part and decides for itself."""
    from fairseq_moe.distributed import barrier
    from fairseq_moe.errors import CheckpointError
    from fairseq_moe.stock.checkpoint import reading
    from tests.helpers.saves import TinyRun

    run = TinyRun(Path(save_dir))
    run.train(1)
    run.save()
    barrier()
    if rank == 0:
        (shard,) = Path(save_dir).glob("shards/*/shard-1-of-2.safetensors")
        shard.write_bytes(shard.read_bytes()[:-4] + b"1234")
    barrier()
    reading.agree = lambda failure: [] if failure is None else [failure]
    reading.with_advice = lambda sentence, path, together: CheckpointError(sentence)
    try:
        run.load()
    except CheckpointError:
        return "refused"
    return "went on"


def test_without_the_agreement_one_rank_would_go_on(tmp_path: Path) -> None:
    assert run_ranks(load_alone, 2, str(tmp_path)) == ["went on", "refused"]
