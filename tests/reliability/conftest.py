"""Checkpoints for the tests of untrusted files."""

import shutil
from pathlib import Path

import pytest

from tests.e2e.commands import train
from tests.reliability.untrusted import Copy


@pytest.fixture(scope="session")
def good(text_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a checkpoint of two updates."""
    save_dir = tmp_path_factory.mktemp("good")
    train(text_data, save_dir, "--disable-validation", "--max-update", "2", "--no-epoch-checkpoints")
    return save_dir


@pytest.fixture
def copy(good: Path, tmp_path: Path) -> Copy:
    """Makes a main file to spoil, with its shards beside it."""

    def make(name: str) -> Path:
        folder = tmp_path / name.replace(" ", "-").replace("^", "")
        shutil.copytree(good, folder)
        return folder / "checkpoint_last.pt"

    return make


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """What a payload makes when it runs."""
    return tmp_path / "marker"
