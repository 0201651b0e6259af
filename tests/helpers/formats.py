"""Write one small MoE model in every format of a checkpoint that the tools know."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fairseq_moe.checkpoint import ModelShape, ShardContent, write_checkpoint

__all__ = [
    "EXPERTS",
    "NUM_EXPERTS",
    "model",
    "optimizer",
    "state",
    "write_branch",
    "write_dense",
    "write_format_1",
    "write_ours",
]

NUM_EXPERTS = 4
EXPERTS = "decoder.layers.1.moe_layer.experts"
_TIED = {"decoder.output_projection.weight": "decoder.embed_tokens.weight"}
_D, _F = 4, 6


def model(seed: int = 1, *, num_experts: int = NUM_EXPERTS, expert_dim: int = _F) -> dict[str, Tensor]:
    """Draw the tensors of a dense layer and one with experts, without attention; tied names left out."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "decoder.embed_tokens.weight": (10, _D),
        "decoder.layers.0.fc1.weight": (_F, _D),
        "decoder.layers.0.fc1.bias": (_F,),
        "decoder.layers.0.fc2.weight": (_D, _F),
        "decoder.layers.0.fc2.bias": (_D,),
        "decoder.layers.1.moe_layer.router.weight": (num_experts, _D),
        f"{EXPERTS}.fc1_weight": (num_experts, expert_dim, _D),
        f"{EXPERTS}.fc1_bias": (num_experts, expert_dim),
        f"{EXPERTS}.fc2_weight": (num_experts, _D, expert_dim),
        f"{EXPERTS}.fc2_bias": (num_experts, _D),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def optimizer(tensors: dict[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Make Adam's state out of the parameters."""
    return {
        name: {"exp_avg": tensor / 2, "exp_avg_sq": tensor**2, "step": 7} for name, tensor in tensors.items()
    }


def state(update: int = 7, **model_flags: Any) -> dict[str, Any]:
    """Make what a main file holds besides tensors."""
    flags = {
        **{"_name": "transformer_lm_gpt", "decoder_embed_dim": _D, "decoder_ffn_embed_dim": _F},
        **{"decoder_layers": 2, "tokens_per_sample": 16, "moe_freq": 2, "moe_expert_count": NUM_EXPERTS},
    }
    return {
        "args": None,
        "cfg": {
            "common": {"user_dir": "fairseq_moe"},
            "model": flags | model_flags,
            "criterion": {"_name": "moe_cross_entropy", "moe_gate_loss_wt": 0.01, "sentence_avg": False},
        },
        "criterion": None,
        "optimizer_history": [{"criterion_name": "MoECrossEntropyCriterion", "num_updates": update}],
        "task_state": {},
        "extra_state": {"train_iterator": {"epoch": 1}},
        "last_optimizer_state": {"param_groups": [{"lr": 0.01}]},
    }


def write_ours(
    path: Path,
    tensors: dict[str, Tensor] | None = None,
    *,
    update: int = 7,
    run_id: str = "run",
    num_shards: int = 1,
    **model_flags: Any,
) -> Path:
    """Write our format, with empty shards beside the full one; returns ``path``."""
    tensors = model() if tensors is None else tensors
    num_experts = len(tensors[f"{EXPERTS}.fc1_bias"])
    full = ShardContent(
        expert_ids=list(range(num_experts)),
        model=dict(tensors),
        optimizer=optimizer(tensors),
        aliases=dict(_TIED),
    )
    write_checkpoint(
        path,
        state=state(update, **model_flags),
        run_id=run_id,
        update=update,
        shape=ModelShape(num_experts=num_experts, top_k=2, model_dim=_D, expert_dim=_F, num_layers=2),
        contents=[full, *(ShardContent() for _ in range(num_shards - 1))],
        num_shards=num_shards,
    )
    return path


def write_format_1(path: Path) -> Path:
    """Write the main file of format 1, which is no longer read: dense tensors in it, experts below ``experts/``."""
    shards = [{"file": "experts/7-old/shard-0-of-1.safetensors", "expert_ids": list(range(NUM_EXPERTS))}]
    manifest = {"version": 1, "update": 7, "num_experts": NUM_EXPERTS, "shards": shards}
    dense = {name: tensor for name, tensor in model().items() if EXPERTS not in name}
    torch.save({**state(), "model": dense, "fairseq_moe": manifest}, path)
    return path


def write_branch(directory: Path, tensors: dict[str, Tensor], *, suffix: str = "") -> Path:
    """Write the moe branch's files of two ranks; returns the plain name, which is no file."""

    def save(kind: str, part: dict[str, Tensor]) -> None:
        moments = optimizer({name: tensor for name, tensor in part.items() if name not in _TIED})
        numbered = {"state": dict(enumerate(moments.values()))}
        numbered["param_groups"] = [{"lr": 0.01, "params": list(numbered["state"])}]  # type: ignore[assignment]
        file = directory / f"checkpoint_last-{kind}{suffix}.pt"
        torch.save({**state(), "model": part, "last_optimizer_state": numbered}, file)

    dense = {name: tensor for name, tensor in tensors.items() if EXPERTS not in name}
    dense |= {alias: tensors[name] for alias, name in _TIED.items()}
    save("shared", {name.replace("router.weight", "gate.wg.weight"): part for name, part in dense.items()})
    for rank in range(2):
        save(
            f"rank-{rank}",
            {
                f"{EXPERTS}.{local}.{name.rpartition('.')[2].replace('_', '.')}": tensor[
                    2 * rank + local
                ].clone()
                for local in range(2)
                for name, tensor in tensors.items()
                if EXPERTS in name
            },
        )
    return directory / "checkpoint_last.pt"


def write_dense(path: Path, seed: int = 1, *, update: int = 7, dtype: torch.dtype = torch.float32) -> Path:
    """Write a dense checkpoint as stock does; returns ``path``."""
    tensors = {name: tensor.to(dtype) for name, tensor in model(seed).items() if "moe_layer" not in name}
    tensors |= {alias: tensors[name] for alias, name in _TIED.items()}
    torch.save({**state(update), "model": tensors}, path)
    return path
