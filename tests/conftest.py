"""Fixtures of the whole suite; one thread, so that sums have one order."""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import tempfile
from pathlib import Path

import pytest
import torch

from tests.helpers.data import build_text_data
from tests.helpers.ranks import run_ranks

torch.set_num_threads(1)

_CONFIGS = tempfile.TemporaryDirectory(prefix="fairseq-configs-")  # removed when pytest ends
os.environ["FAIRSEQ_MOE_TEST_CONFIGS"] = _CONFIGS.name  # for tests.helpers.tiny


@pytest.fixture(scope="session")
def text_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as fairseq-preprocess leaves it: dict.txt and train, valid and test of real text."""
    folder = tmp_path_factory.mktemp("text-data")
    run_ranks(build_text_data, 1, str(folder))
    return folder
