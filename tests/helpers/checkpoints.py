"""Write small checkpoints, and read the content of any without this package's reader."""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from fairseq_moe.checkpoint import Checkpoint, ModelShape, ShardContent, write_checkpoint

__all__ = [
    "EXPERTS",
    "assert_moments_are_rounded",
    "assert_same",
    "contents",
    "manifest_of",
    "small_checkpoint",
    "small_content",
]

EXPERTS = "decoder.layers.1.moe_layer.experts.fc1_weight"


def small_content(num_experts: int, *, seed: int = 1) -> ShardContent:
    """Draw two expert parameters, three dense ones of different sizes, tied weights, and Adam's state of all."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    model = {
        EXPERTS: draw(num_experts, 3, 4),
        EXPERTS.replace("weight", "bias"): draw(num_experts, 4),
        "decoder.embed_tokens.weight": draw(10, 4),
        "decoder.layers.1.moe_layer.router.weight": draw(num_experts, 4).to(torch.bfloat16),
        "decoder.version": torch.tensor([3]),
    }
    optimizer = {
        name: {"exp_avg": draw(*tensor.shape), "exp_avg_sq": draw(*tensor.shape), "step": 7}
        for name, tensor in model.items()
        if name != "decoder.version"
    }
    return ShardContent(
        expert_ids=list(range(num_experts)),
        model=dict(model),
        optimizer=optimizer,
        aliases={"decoder.output_projection.weight": "decoder.embed_tokens.weight"},
    )


def small_checkpoint(
    path: Path,
    *,
    num_experts: int = 4,
    num_shards: int = 2,
    seed: int = 1,
    update: int = 7,
    run_id: str = "a",
) -> Path:
    """Write a complete checkpoint of ``small_content``; returns ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    known = {
        "state": {"cfg": None, "extra_state": {"train_iterator": {"epoch": 1}}, "last_optimizer_state": {}},
        "run_id": run_id,
        "update": update,
        "shape": ModelShape(num_experts=num_experts, top_k=2, model_dim=4, expert_dim=3, num_layers=2),
    }
    with tempfile.TemporaryDirectory() as folder:
        one = Path(folder) / "one.pt"
        write_checkpoint(one, **known, contents=[small_content(num_experts, seed=seed)], num_shards=1)
        write_checkpoint(
            path, **known, contents=Checkpoint.open(one).split(num_shards), num_shards=num_shards
        )
    return path


def manifest_of(main: Path) -> dict[str, Any]:
    """Read the list of shards in a main file, as it stands there."""
    return torch.load(main, weights_only=True)["fairseq_moe"]


def contents(main: Path) -> dict[str, Any]:
    """Read all parameters and optimizer state of a checkpoint, experts in the order of their global ids."""
    found: dict[str, Any] = {}
    rows: dict[str, dict[int, torch.Tensor]] = {}
    for shard in manifest_of(main)["shards"]:
        with safe_open(main.parent / shard["file"], framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a mapping
                tensor = file.get_tensor(key)
                if ".experts." in key:
                    rows.setdefault(key, {}).update(zip(shard["expert_ids"], tensor, strict=True))
                else:
                    assert key not in found, f"{key} is written twice"
                    found[key] = tensor
            for name, values in json.loads(file.metadata()["optimizer"]).items():
                found |= {f"optimizer/{name}/{key}": value for key, value in values.items()}
    found |= {key: torch.stack([by_id[expert] for expert in sorted(by_id)]) for key, by_id in rows.items()}
    assert found, f"{main} names no shard that holds a tensor"
    return found


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Compare two results of ``contents`` to the bit; nothing equals nothing would say nothing."""
    assert expected, "there is nothing to compare with"
    assert sorted(found) == sorted(expected)
    for key, value in expected.items():
        same = torch.equal(found[key], value) if isinstance(value, torch.Tensor) else found[key] == value
        assert same, key


def assert_moments_are_rounded(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Parameters equal to the bit, moments to half precision: of the second one the root is kept."""
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if key.endswith(("/exp_avg", "/exp_avg_sq")):
            assert value.any()
            torch.testing.assert_close(found[key], value, rtol=2**-9, atol=0.0)
        else:
            assert_same({key: found[key]}, {key: value})
