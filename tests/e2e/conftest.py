"""A checkpoint of a tiny MoE model, trained once for all end-to-end tests."""

from pathlib import Path

import pytest

from tests.e2e.commands import train


@pytest.fixture(scope="session")
def moe_checkpoint(text_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``checkpoint_last.pt`` after 4 updates on one process."""
    save_dir = tmp_path_factory.mktemp("moe")
    train(text_data, save_dir, "--disable-validation")
    return save_dir / "checkpoint_last.pt"
