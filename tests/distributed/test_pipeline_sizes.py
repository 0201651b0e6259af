"""The sizes that a pipeline logs are those of the whole model, words that lie on two stages counted once.

Run with ``pytest tests/distributed/test_pipeline_sizes.py``.
"""

import io
import logging
from typing import Any

from tests.helpers.block_models import MODELS
from tests.helpers.ranks import run_ranks

P2 = ("--pipeline-model-parallel-size", 2, "--decoder-first-pipeline-num-layers", 1, "--update-freq", 2)


def _logged_sizes(rank: int, *models: tuple[Any, ...]) -> list[list[str]]:
    from tests.helpers.tiny import build_trainer

    logger, text = logging.getLogger("fairseq_moe.stock.step.start_log"), io.StringIO()
    logger.setLevel(logging.INFO)
    logger.addHandler(logging.StreamHandler(text))
    found = []
    for flags in models:
        text.truncate(text.seek(0))
        build_trainer(flags)
        found.append([line for line in text.getvalue().splitlines() if "model params" in line])
    return found


def test_stages_log_the_size_of_the_whole() -> None:
    models = ((), MODELS["latent"])
    (alone,) = run_ranks(_logged_sizes, 1, *models)
    assert all(len(lines) == 3 for lines in alone)
    piped = [(*flags, *P2) for flags in models]
    assert run_ranks(_logged_sizes, 2, *piped) == [alone, alone]
