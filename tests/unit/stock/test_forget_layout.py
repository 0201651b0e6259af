"""Who only uses a checkpoint's model spreads it over the ranks there are: every flag about axes is forgotten."""

from dataclasses import fields
from typing import Any

import pytest

from fairseq_moe.flags.moe import MoEConfig
from fairseq_moe.flags.parallel import Axes, ParallelConfig
from tests.helpers.ranks import run_ranks

TRAINED: dict[str, Any] = {
    "num_experts": 8,
    "expert_model_parallel_size": 4,
    "expert_tensor_parallel_size": 2,
    "tensor_model_parallel_size": 2,
    "sequence_parallel": True,
    "context_parallel_size": 2,
    "pipeline_model_parallel_size": 2,
    "num_layers_per_virtual_pipeline_stage": 1,
    "num_virtual_stages_per_pipeline_rank": 2,
    "decoder_first_pipeline_num_layers": 2,
    "decoder_last_pipeline_num_layers": 2,
    "cp_comm_type": "all_gather",
    "tp_comm_overlap": True,
    "moe_extended_tp": True,
    "moe_extended_ep": True,
}


def _forgotten(rank: int, is_structured: bool) -> dict[str, Any]:
    from omegaconf import OmegaConf

    from fairseq_moe.models.moe_transformer_lm import MoETransformerLanguageModelConfig
    from fairseq_moe.stock.checkpoint.mismatch import forget_layout

    cfg = OmegaConf.create(TRAINED)
    if is_structured:
        cfg = OmegaConf.merge(OmegaConf.structured(MoETransformerLanguageModelConfig), cfg)
    forget_layout(cfg)
    return {name: cfg[name] for name in TRAINED}


@pytest.mark.parametrize("is_structured", [False, True])
def test_every_flag_about_axes_is_forgotten(is_structured: bool) -> None:
    """The configuration in a file is a plain one, that of a program may know its types."""
    assert {field.name for field in fields(ParallelConfig)} < TRAINED.keys()
    [kept] = run_ranks(_forgotten, 1, is_structured)
    moe = MoEConfig.from_args(kept)
    assert moe.parallel == ParallelConfig() and moe.axes == Axes() and moe.num_experts == 8
