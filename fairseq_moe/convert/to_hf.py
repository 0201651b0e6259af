"""Convert our checkpoint back to a Hugging Face directory: published names, or those that the model came with."""

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fairseq_moe.checkpoint.safetensors_bytes import bytes_of
from fairseq_moe.convert.directories import appearing, copy_companions
from fairseq_moe.convert.from_hf import Conversion
from fairseq_moe.convert.hf.config_writer import as_family_of, write_config
from fairseq_moe.convert.hf.directory import INDEX, SINGLE, digest_of, read_json, read_weight_map
from fairseq_moe.convert.hf.file import SafetensorsWriter
from fairseq_moe.convert.hf.mxfp4 import unpacked_names
from fairseq_moe.convert.hf.names import OurTensor, copied_names, is_fused, tensor_table
from fairseq_moe.convert.original_blocks import OriginalBlocks
from fairseq_moe.convert.output import Output, with_originals
from fairseq_moe.convert.store import COMPANIONS, CONVERSION, StoredModel
from fairseq_moe.errors import CheckpointError
from fairseq_moe.models.fitting import is_bookkeeping
from fairseq_moe.progress import progress

__all__ = ["to_hf"]

_BIAS = ".expert_bias"


def to_hf(
    checkpoint: Path,
    target: Path,
    *,
    companions: Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
    ignored_keys: Collection[str] = (),
) -> Conversion:
    """Convert a checkpoint of ours to a Hugging Face directory.

    Args:
        checkpoint: main file of a checkpoint, or the directory that ``from_hf`` made.
        target: directory to be made.
        companions: directory with config.json, tokenizer and so on; None: the ``hf`` directory beside the
            checkpoint, or beside the one that training began with.
        dtype: of the weights, but for the bias of routers, which stays float32; None: as they are.
        max_shard_bytes: largest file, for a model that did not come in files of its own.
        ignored_keys: of the config.json in ``companions``, which the user says change nothing; those that ``from_hf``
            was told are known.

    Raises:
        ConfigError: no family has this model, or it is not that of the config.json it came with.
        CheckpointError: the checkpoint is damaged or incomplete, or ``target`` exists.
    """
    with appearing(target) as directory:
        model = StoredModel.open(checkpoint)
        beside = _find_companions(model, companions)
        like, record, weight_map = _read_companions(beside)
        ignored = {*ignored_keys, *record.get("ignored_config_keys", ())}
        model = replace(model, spec=as_family_of(model.spec, like, ignored=ignored))
        table = tensor_table(model.spec, fused=is_fused(unpacked_names(weight_map)))
        _check_names(model, table)
        originals = _originals(beside, record, dtype)
        untouched = originals.untouched(model, table)
        outputs = with_originals(_outputs(model, table, weight_map, dtype), originals, untouched)
        files = _files(outputs, weight_map, max_shard_bytes)
        if beside is not None:
            copy_companions(beside, directory)
            (directory / CONVERSION).unlink(missing_ok=True)
        config = write_config(model.spec, like=like, dtype=_main_dtype(outputs), ignored=ignored)
        if like is not None and untouched:
            config["quantization_config"] = originals.settings(like, untouched)
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        digests = _write_files(model, outputs, files, directory, target.name)
        originals.check(digests)
    stored = {name: (output.dtype, output.shape) for name, output in outputs.items()}
    digest = digest_of(digests, stored)
    return Conversion(
        target=target,
        spec=model.spec,
        digest=digest,
        num_tensors=len(outputs),
        num_bytes=sum(output.num_bytes for output in outputs.values()),
        notes=originals.notes(untouched) + _notes(beside, record, digest),
    )


def _find_companions(model: StoredModel, given: Path | None) -> Path | None:
    if given is not None:
        if not (given / "config.json").is_file():
            raise CheckpointError(f"{given} has no config.json; give the directory that has it.")
        return given
    places = [model.path.parent]
    if model.restored_from is not None:
        places.append(model.restored_from.parent)
    for place in places:
        if (place / COMPANIONS / "config.json").is_file():
            return place / COMPANIONS
    return None


def _read_companions(
    beside: Path | None,
) -> tuple[dict[str, Any] | None, dict[str, Any], dict[str, str]]:
    """Read config.json, the record of the conversion, and which file held each tensor."""
    if beside is None:
        return None, {}, {}
    config, path = read_json(beside / "config.json"), beside / CONVERSION
    return (config, read_json(path), read_weight_map(path)) if path.is_file() else (config, {}, {})


def _originals(beside: Path | None, record: dict[str, Any], dtype: torch.dtype | None) -> OriginalBlocks:
    """Find the blocks that the model came with; where weights are converted, there are none."""
    if beside is None or dtype is not None:
        return OriginalBlocks(record=Path(), kept={}, parts={})
    return OriginalBlocks.open(beside, record.get("mxfp4", {}))


def _notes(beside: Path | None, record: dict[str, Any], digest: str) -> list[str]:
    if beside is None:
        return [
            "There was no hf directory beside the checkpoint or the one that training began with: config.json "
            "follows from the flags, and there is no tokenizer (--companions DIR says where they are)."
        ]
    if record.get("quantized") is False:
        same = "the same as" if record.get("digest") == digest else "others than"
        return [f"Names, shapes, dtypes and bits are {same} those of the model it came from."]
    return []


def _check_names(model: StoredModel, table: list[OurTensor]) -> None:
    expected = {tensor.name: tensor.shape for tensor in table}
    found = {name for name in model.names() if not is_bookkeeping(name)}
    problems = [f"lacks {name}" for name in expected if name not in found]
    problems += [
        f"has {name}, which no {model.spec.family} model has" for name in sorted(found - set(expected))
    ]
    problems += [
        f"has {name} of shape {model.shape(name)}, expected {shape}"
        for name, shape in expected.items()
        if name in found and model.shape(name) != shape
    ]
    if problems:
        raise CheckpointError(f"{model.path} {'; it '.join(problems[:5])}.")


def _outputs(
    model: StoredModel, table: list[OurTensor], weight_map: Mapping[str, str], dtype: torch.dtype | None
) -> dict[str, Output]:
    found = {}
    for tensor in table:
        keeps = dtype is None or tensor.name.endswith(_BIAS)
        own_dtype = model.dtype(tensor.name) if keeps or dtype is None else dtype
        for block in tensor.blocks:
            found[block.name] = Output(source=tensor, block=block, dtype=own_dtype)
    # A model that came without copies goes without; one that is written for the first time needs none.
    copies = {copy: name for copy, name in copied_names(model.spec).items() if copy in weight_map}
    return found | {copy: found[name] for copy, name in copies.items()}


def _main_dtype(outputs: Mapping[str, Output]) -> str:
    """Name the dtype that most of the bytes have, blocks left out."""
    sizes: dict[torch.dtype, int] = {}
    for output in (output for output in outputs.values() if output.original is None):
        sizes[output.dtype] = sizes.get(output.dtype, 0) + output.num_bytes
    return str(max(sizes, key=lambda dtype: sizes[dtype])).removeprefix("torch.")


def _files(
    outputs: Mapping[str, Output], weight_map: Mapping[str, str], max_bytes: int
) -> dict[str, list[str]]:
    """Lay tensors out in files: as the model came, or one after the other until a file is full."""
    files: dict[str, list[str]] = {}
    if set(weight_map) == set(outputs):
        for name in outputs:
            files.setdefault(weight_map[name], []).append(name)
        return files
    groups: list[list[str]] = [[]]
    size = 0
    for name, output in outputs.items():
        if groups[-1] and size + output.num_bytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += output.num_bytes
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {
        f"model-{index:05d}-of-{len(groups):05d}.safetensors": group
        for index, group in enumerate(groups, start=1)
    }


def _write_files(
    model: StoredModel,
    outputs: Mapping[str, Output],
    files: Mapping[str, list[str]],
    directory: Path,
    label: str,
) -> dict[str, str]:
    """Write all files and the index; returns the sha256 of each tensor's bytes."""
    digests: dict[str, str] = {}
    num_bytes = sum(output.num_bytes for output in outputs.values())
    with progress(f"{model.path.name} to {label}", num_bytes) as advance:
        for file in sorted(files):
            shapes = {name: (outputs[name].dtype, outputs[name].shape) for name in files[file]}
            writer = SafetensorsWriter(directory / file, shapes)
            writer.write(_tensors(model, outputs, writer.names, digests, advance))
    if set(files) != {SINGLE}:
        index = {
            "metadata": {
                # A router's bias is a buffer, no parameter, but where it has rows.
                "total_parameters": sum(
                    output.num_parameters
                    for output in outputs.values()
                    if not output.source.name.endswith(_BIAS) or len(output.block.shape) > 1
                ),
                "total_size": num_bytes,
            },
            "weight_map": dict(sorted((name, file) for file, names in files.items() for name in names)),
        }
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return digests


def _tensors(
    model: StoredModel,
    outputs: Mapping[str, Output],
    names: list[str],
    digests: dict[str, str],
    advance: Callable[[int], None],
) -> Iterator[Tensor]:
    for name in names:
        digest = hashlib.sha256()
        for piece in outputs[name].pieces(model):
            digest.update(bytes_of(piece))
            advance(piece.nbytes)
            yield piece
        digests[name] = digest.hexdigest()
