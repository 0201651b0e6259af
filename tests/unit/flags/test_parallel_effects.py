"""Every parallel argument of Megatron's guides has a test that shows what it does, and none is refused as such."""

from dataclasses import fields

import pytest

from fairseq_moe.flags.megatron import MegatronConfig
from fairseq_moe.flags.megatron_aliases import MEGATRON_ARGS, MEGATRON_VALUES
from fairseq_moe.flags.parallel import ParallelConfig
from fairseq_moe.flags.records import declared_fields, flag_name
from fairseq_moe.flags.sharding import ShardingConfig
from tests.helpers.ranks import REPOSITORY

_HOLD = "tests/distributed/test_parallel_arguments.py"  # who holds which layers and experts; gradients
_SHARDED = "tests/distributed/test_sharded_states.py"
_PARTS = "tests/distributed/test_sharded_decoder.py"

# The rows of both guides' tables of parallelism, and the test that shows each one's effect.
EFFECTS = {
    "tensor_model_parallel_size": _PARTS,
    "sequence_parallel": _PARTS,
    "tp_comm_overlap": "tests/e2e/test_training.py",  # a line at the start
    "pipeline_model_parallel_size": _HOLD,
    "num_layers_per_virtual_pipeline_stage": _HOLD,
    "num_virtual_stages_per_pipeline_rank": _HOLD,
    "decoder_first_pipeline_num_layers": _HOLD,
    "decoder_last_pipeline_num_layers": _HOLD,
    "context_parallel_size": "tests/distributed/test_context_memory.py",
    "cp_comm_type": _HOLD,
    "expert_model_parallel_size": _HOLD,
    "expert_tensor_parallel_size": _HOLD,
    "moe_extended_tp": _HOLD,
    "moe_extended_ep": _HOLD,
    "use_distributed_optimizer": _SHARDED,
    "use_torch_fsdp2": _SHARDED,
    "overlap_grad_reduce": "tests/e2e/test_sharded_states.py",  # lines at the start
    "overlap_param_gather": "tests/e2e/test_sharded_states.py",
}


def test_the_table_has_every_parallel_argument() -> None:
    ours = {field.name for record in (ParallelConfig, ShardingConfig) for field in declared_fields(record)}
    of_experts = {field.name for field in fields(MegatronConfig) if field.name.endswith("_parallel_size")}
    assert EFFECTS.keys() == ours | of_experts


@pytest.mark.parametrize("name", EFFECTS)
def test_the_test_of_its_effect_gives_the_argument(name: str) -> None:
    text = (REPOSITORY / EFFECTS[name]).read_text(encoding="utf-8")
    assert flag_name(name) in text or name in text


def test_no_text_says_that_an_axis_is_missing() -> None:
    texts = [
        str(field.metadata["help"])
        for record in (ParallelConfig, ShardingConfig, MegatronConfig)
        for field in declared_fields(record)
    ]
    texts += [row.text for row in (*MEGATRON_ARGS, *MEGATRON_VALUES)]
    texts += [(REPOSITORY / "docs" / page).read_text(encoding="utf-8") for page in ("flags.md", "routing.md")]
    for words in ("not there yet", "does not exist here", "not supported yet"):
        assert [text for text in texts if words in text] == []
