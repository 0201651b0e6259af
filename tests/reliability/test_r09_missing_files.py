"""R9: a file that was asked for and is not there ends the run on all ranks; nothing starts afresh in silence."""

from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

from tests.helpers.ranks import run_ranks


def start(rank: int, save_dirs: list[str], flags: list[str], guarded: bool) -> str:
    """Start a run as fairseq-train does, each rank seeing its own directory; returns how that ends."""
    from fairseq import checkpoint_utils

    from fairseq_moe.errors import CheckpointError
    from fairseq_moe.stock.checkpoint import loading
    from tests.helpers.saves import TinyRun

    if not guarded:
        loading._find = lambda filename, cfg: filename
    run = TinyRun(Path(save_dirs[0]), *flags)
    run.checkpoint_cfg.save_dir = save_dirs[rank]
    run.trainer.get_train_iterator = lambda **kwargs: MagicMock(epoch=1)  # a run's data do not matter here
    try:
        extra_state, _ = checkpoint_utils.load_checkpoint(run.checkpoint_cfg, run.trainer)
    except CheckpointError as error:
        return f"{'agreed' if error.agreed else 'alone'}: {error}"
    return "afresh" if extra_state is None else f"update {run.num_updates}"


def save(rank: int, save_dir: str, *flags: Any) -> None:
    from tests.helpers.saves import TinyRun

    run = TinyRun(Path(save_dir), *flags)
    run.train(1)
    run.save()


def same_for_both(folders: list[Path], *flags: Any, guarded: bool = True) -> str:
    said = run_ranks(start, 2, [str(folder) for folder in folders], [str(flag) for flag in flags], guarded)
    assert said[0] == said[1]
    return str(said[0])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with checkpoint_1_1.pt and checkpoint_last.pt."""
    folder = tmp_path_factory.mktemp("saved")
    run_ranks(save, 2, str(folder), "--save-interval-updates", 1)
    return folder


def test_a_mistyped_file_is_refused(saved: Path) -> None:
    said = same_for_both([saved, saved], "--restore-file", saved / "checkpoint_lats.pt")
    assert said.startswith(f"agreed: --restore-file {saved / 'checkpoint_lats.pt'} does not exist")
    assert said.endswith(f"The newest intact checkpoint there is {saved / 'checkpoint_last.pt'}.")


def test_without_the_check_it_would_start_afresh(saved: Path) -> None:
    assert (
        same_for_both([saved, saved], "--restore-file", saved / "checkpoint_lats.pt", guarded=False)
        == "afresh"
    )


def test_a_directory_that_one_rank_does_not_see_is_refused(saved: Path, tmp_path: Path) -> None:
    for folders in ([saved, tmp_path], [tmp_path, saved]):
        said = run_ranks(start, 2, [str(folder) for folder in folders], [], True)
        without = folders.index(tmp_path)
        for sentence in said:
            assert f"exists for some ranks only, not for [{without}]" in sentence
            assert sentence.startswith("agreed: ")


def test_a_file_that_is_empty_for_one_rank_is_refused(saved: Path, tmp_path: Path) -> None:
    empty = tmp_path / "checkpoint_last.pt"
    empty.write_bytes(b"")
    said = same_for_both([saved, tmp_path])
    assert said.startswith(f"agreed: cannot read checkpoint file {empty}")


def test_a_lost_last_checkpoint_is_no_fresh_start(saved: Path, tmp_path: Path) -> None:
    run_ranks(save, 2, str(tmp_path), "--save-interval-updates", 1, "--no-last-checkpoints")
    said = same_for_both([tmp_path, tmp_path], "--no-last-checkpoints")
    last, other = tmp_path / "checkpoint_last.pt", tmp_path / "checkpoint_1_1.pt"
    assert said.startswith(f"agreed: {last} does not exist, but there are checkpoint_1_1.pt beside it")
    assert said.endswith(f"The newest intact checkpoint there is {other}.")
    assert same_for_both([tmp_path, tmp_path], "--restore-file", other) == "update 1"
    assert same_for_both([tmp_path, tmp_path]) == "update 1"  # it should be there: its save was interrupted


def test_an_empty_directory_is_a_fresh_start(tmp_path: Path) -> None:
    assert same_for_both([tmp_path, tmp_path]) == "afresh"
