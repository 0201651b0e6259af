"""Sets of expert shards: safetensors files whose tensors have one row per expert.

Keys are ``model/<parameter name>`` and ``optimizer/<parameter name>/<state name>``. Optimizer values that
have no
row per expert (Adam's step counter) lie in the file's metadata.
"""

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fairseq_moe.checkpoint.files import load_plain, sha256_of, write_atomically
from fairseq_moe.checkpoint.manifest import MANIFEST_KEY, Manifest, ShardEntry
from fairseq_moe.errors import CheckpointError

__all__ = ["SETS_DIR", "ExpertState", "prune_sets", "read_experts", "write_shard"]

logger = logging.getLogger(__name__)

SETS_DIR = "experts"

# (model tensors by parameter name, optimizer state by parameter name and state name)
ExpertState = tuple[dict[str, Tensor], dict[str, dict[str, Any]]]


def write_shard(
    directory: Path,
    set_name: str,
    *,
    index: int,
    num_shards: int,
    expert_ids: Sequence[int],
    state: ExpertState,
) -> ShardEntry:
    """Write one owner's experts.

    Args:
        directory: where the main file will lie.
        set_name: name of the set, the same for all shards.
        index: number of this shard.
        num_shards: number of shards of the set.
        expert_ids: global ids of the rows.
        state: tensors of shape (len(expert_ids), ...).

    Returns:
        its entry for the manifest.

    Raises:
        OSError: the file cannot be written.
    """
    model, optimizer = state
    tensors = {f"model/{name}": tensor for name, tensor in model.items()}
    whole: dict[str, dict[str, Any]] = {}
    for name, values in optimizer.items():
        for key, value in values.items():
            if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == len(expert_ids):
                tensors[f"optimizer/{name}/{key}"] = value
            else:
                whole.setdefault(name, {})[key] = value.item() if isinstance(value, Tensor) else value
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    metadata = {"expert_ids": json.dumps(list(expert_ids)), "optimizer": json.dumps(whole)}
    path = directory / SETS_DIR / set_name / f"shard-{index}-of-{num_shards}.safetensors"
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))
    return ShardEntry(
        file=path.relative_to(directory).as_posix(),
        expert_ids=list(expert_ids),
        num_bytes=path.stat().st_size,
        sha256=sha256_of(path),
    )


def read_experts(
    directory: Path, manifest: Manifest, *, expert_ids: Sequence[int], with_optimizer: bool
) -> ExpertState:
    """The given experts, gathered from the shards that hold them.

    Args:
        directory: where the main file lies.
        manifest: its list of shards.
        expert_ids: global ids wanted, in this order.
        with_optimizer: read optimizer state too.

    Returns:
        tensors of shape (len(expert_ids), ...).

    Raises:
        CheckpointError: a shard is missing, damaged, or not the one that the main file names.
    """
    rows: dict[str, dict[int, Tensor]] = {}
    whole: dict[str, dict[str, list[Any]]] = {}
    wanted = set(expert_ids)
    for entry in manifest.shards:
        here = [expert for expert in entry.expert_ids if expert in wanted]
        if here:
            _read_shard(directory / entry.file, entry, here, rows, whole, with_optimizer=with_optimizer)
    model: dict[str, Tensor] = {}
    optimizer: dict[str, dict[str, Any]] = {}
    for key, by_expert in rows.items():
        stacked = torch.stack([by_expert[expert] for expert in expert_ids])
        kind, name = key.split("/", 1)
        if kind == "model":
            model[name] = stacked
        else:
            name, state_name = name.rsplit("/", 1)
            optimizer.setdefault(name, {})[state_name] = stacked
    for name, values in whole.items():
        for state_name, found in values.items():
            optimizer.setdefault(name, {})[state_name] = _one_value(found, name, state_name, directory)
    return model, optimizer


def _read_shard(
    path: Path,
    entry: ShardEntry,
    wanted: list[int],
    rows: dict[str, dict[int, Tensor]],
    whole: dict[str, dict[str, list[Any]]],
    *,
    with_optimizer: bool,
) -> None:
    _verify(path, entry)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            ids = json.loads(metadata["expert_ids"])
            if ids != entry.expert_ids:
                raise CheckpointError(
                    f"{path} holds experts {ids}, its checkpoint expects {entry.expert_ids}."
                )
            for key in file.keys():  # noqa: SIM118 - not a mapping
                if key.startswith("model/") or with_optimizer:
                    tensor = file.get_tensor(key)
                    rows.setdefault(key, {}).update({expert: tensor[ids.index(expert)] for expert in wanted})
            if with_optimizer:
                for name, values in json.loads(metadata["optimizer"]).items():
                    for state_name, value in values.items():
                        whole.setdefault(name, {}).setdefault(state_name, []).append(value)
    except (SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"cannot read expert shard {path} ({error}); restore it from a copy."
        ) from error


def _verify(path: Path, entry: ShardEntry) -> None:
    if not path.is_file():
        raise CheckpointError(
            f"expert shard {path} (experts {entry.expert_ids}) is missing; copy the directory {SETS_DIR}/ "
            "along with the checkpoint file."
        )
    num_bytes = path.stat().st_size
    if num_bytes != entry.num_bytes:
        raise CheckpointError(
            f"expert shard {path} has {num_bytes} bytes, expected {entry.num_bytes}; it is damaged."
        )
    digest = sha256_of(path)
    if digest != entry.sha256:
        raise CheckpointError(
            f"expert shard {path} has sha256 {digest}, expected {entry.sha256}; it is damaged."
        )


def _one_value(found: list[Any], name: str, state_name: str, directory: Path) -> Any:
    if any(value != found[0] for value in found):
        raise CheckpointError(
            f"the optimizer state {state_name} of {name} in {directory} differs between expert shards and "
            "cannot be merged; resume with as many ranks as wrote it, or pass --reset-optimizer."
        )
    return found[0]


def prune_sets(directory: Path) -> None:
    """Delete the sets that no main file in ``directory`` names; nothing if any main file cannot be read."""
    sets = [path for path in (directory / SETS_DIR).glob("*") if path.is_dir()]
    named: set[Path] = set()
    for main in directory.glob("*.pt"):
        try:
            state = load_plain(main, lazily=True)
            if MANIFEST_KEY in state:
                manifest = Manifest.from_dict(state[MANIFEST_KEY], source=main)
                named.update((directory / entry.file).parent for entry in manifest.shards)
        except CheckpointError as error:
            logger.warning("old expert shards are kept: %s", error)
            return
    for path in sets:
        if path not in named:
            shutil.rmtree(path, ignore_errors=True)
