"""Fixtures of the whole suite; one thread, so that sums have one order."""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

# Before anything imports triton. With a GPU its kernels are compiled (tests/gpu), without one interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tests.helpers.data import build_text_data
from tests.helpers.hf import build_hf_model
from tests.helpers.ranks import run_ranks

torch.set_num_threads(1)

# ve-fairseq brings a torchaudio along. Where it was built for another torch, its import fails, and with it that of
# transformers; nothing here needs it.
sys.modules.setdefault("torchaudio", None)  # type: ignore[arg-type]

_CONFIGS = tempfile.TemporaryDirectory(prefix="fairseq-configs-")  # removed when pytest ends
os.environ["FAIRSEQ_MOE_TEST_CONFIGS"] = _CONFIGS.name  # for tests.helpers.tiny


@pytest.fixture(scope="session")
def text_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as fairseq-preprocess leaves it: dict.txt and train, valid and test of real text."""
    folder = tmp_path_factory.mktemp("text-data")
    run_ranks(build_text_data, 1, str(folder))
    return folder


@pytest.fixture(scope="session")
def hf_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``hf_model(name, **changes)``: a directory as ``build_hf_model`` makes it, made once; do not write into it."""
    made: dict[str, Path] = {}

    def get(name: str, **changes: object) -> Path:
        key = repr((name, sorted(changes.items(), key=str)))
        if key not in made:
            made[key] = build_hf_model(name, tmp_path_factory.mktemp(name) / name, **changes)  # type: ignore[arg-type]
        return made[key]

    return get
