"""What is in a checkpoint, read without this package's reader."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

__all__ = ["assert_same", "contents", "manifest_of"]


def manifest_of(main: Path) -> dict[str, Any]:
    """The list of shards in a main file, as it stands there."""
    return torch.load(main, weights_only=True)["fairseq_moe"]


def contents(main: Path) -> dict[str, Any]:
    """Everything a checkpoint says about parameters, experts in the order of their global ids."""
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
    return found | {
        key: torch.stack([by_id[expert] for expert in sorted(by_id)]) for key, by_id in rows.items()
    }


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Two results of ``contents`` are equal to the bit."""
    assert sorted(found) == sorted(expected)
    for key, value in expected.items():
        same = torch.equal(found[key], value) if isinstance(value, torch.Tensor) else found[key] == value
        assert same, key
