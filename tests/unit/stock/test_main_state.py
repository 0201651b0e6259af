"""The sizes that a checkpoint names, read off the flags of a run or of a file."""

from argparse import Namespace

import pytest
from omegaconf import OmegaConf

from fairseq_moe.checkpoint import ModelShape
from fairseq_moe.stock.checkpoint.main_state import model_shape

FLAGS = {
    "decoder_embed_dim": 16,
    "decoder_ffn_embed_dim": 32,
    "decoder_layers": 2,
    "moe_freq": 2,
    "moe_expert_count": 4,
}


def test_flags_of_a_run_and_of_a_file_give_the_same_shape() -> None:
    expected = ModelShape(num_experts=4, top_k=2, model_dim=16, expert_dim=32, num_layers=2)
    for flags in (FLAGS, Namespace(**FLAGS), OmegaConf.create(FLAGS)):
        assert model_shape(flags) == expected


@pytest.mark.parametrize("missing", ["decoder_embed_dim", "decoder_ffn_embed_dim", "decoder_layers"])
def test_a_size_that_is_missing_is_named(missing: str) -> None:
    with pytest.raises(KeyError, match=missing):
        model_shape({name: value for name, value in FLAGS.items() if name != missing})
