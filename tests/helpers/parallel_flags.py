"""Make training configurations with parallel axes, and list what they are told before data is read."""

from types import SimpleNamespace
from typing import Any

from fairseq_moe.flags.moe_checks import moe_problems

__all__ = [
    "BRANCH",
    "C2",
    "DENSE",
    "E2",
    "E4",
    "LATENT",
    "MODEL",
    "OWN",
    "P2",
    "P4",
    "PADDED",
    "T2",
    "T4",
    "V2",
    "X1",
    "X2",
    "ZERO_1",
    "ZERO_3",
    "configuration",
    "problems",
]

MODEL = {
    "num_experts": 8,
    "decoder_layers": 4,
    "moe_layer_freq": "2",
    "decoder_embed_dim": 32,
    "decoder_ffn_embed_dim": 64,
    "decoder_attention_heads": 4,
    "decoder_normalize_before": True,
}
T2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
T4, C2 = T2 | {"tensor_model_parallel_size": 4}, {"context_parallel_size": 2}
P2, P4 = {"pipeline_model_parallel_size": 2}, {"pipeline_model_parallel_size": 4}
V2 = {"num_virtual_stages_per_pipeline_rank": 2}
E2, E4 = {"expert_model_parallel_size": 2}, {"expert_model_parallel_size": 4}
X1, X2 = {"expert_tensor_parallel_size": 1}, {"expert_tensor_parallel_size": 2}
BRANCH = {"num_experts": None, "moe_layer_freq": None, "moe_freq": 2, "moe_expert_count": 8}
DENSE = {"num_experts": None, "moe_layer_freq": None}
OWN = {
    "decoder_normalization": "rmsnorm",
    "gated_ffn": True,
    "decoder_kv_heads": 4,
    "decoder_normalize_before": False,
}
LATENT = {
    "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4, "position_embedding": "rope"
}  # fmt: skip
ZERO_1, ZERO_3 = {"use_distributed_optimizer": True}, {"use_torch_fsdp2": True}
PADDED = {"moe_pad_expert_input_to_capacity": True, "moe_expert_capacity_factor": 1.0}


def configuration(
    model: dict[str, Any],
    *,
    ranks: int = 8,
    backend: str = "legacy_ddp",
    optimizer: str = "adam",
    criterion: str = "moe_cross_entropy",
    task: str = "language_modeling",
    update_freq: tuple[int, ...] = (4,),
    **training: Any,
) -> Any:
    """A training run's configuration, with ``MODEL`` and these flags of the model."""
    flags = {key: value for key, value in {**MODEL, **model}.items() if value is not None}
    precision = dict.fromkeys(("fp16", "memory_efficient_fp16", "bf16", "memory_efficient_bf16"), False)
    return SimpleNamespace(
        model=SimpleNamespace(**flags),
        criterion=SimpleNamespace(_name=criterion),
        optimizer=SimpleNamespace(_name=optimizer),
        optimization=SimpleNamespace(update_freq=list(update_freq)),
        task=SimpleNamespace(_name=task, data="data-bin"),
        common=SimpleNamespace(**precision),
        distributed_training=SimpleNamespace(
            ddp_backend=backend, distributed_world_size=ranks, fp32_reduce_scatter=False, **training
        ),
    )


def problems(model: dict[str, Any], *, ranks: int = 8, **run: Any) -> list[str]:
    """What a training run with such flags is told before data is read; ``run`` as of ``configuration``."""
    return moe_problems(configuration(model, ranks=ranks, **run), world_size=ranks)
