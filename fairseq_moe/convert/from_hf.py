"""Convert a Hugging Face directory to our checkpoint, one of our tensors at a time.

``OUT/checkpoint.pt`` and ``OUT/shards`` are the checkpoint, ``OUT/dict.txt`` is its dictionary, ``OUT/flags.txt`` what
fairseq-train must be told to build the model, ``OUT/hf`` holds config.json, tokenizer and whatever else was
beside the weights, and ``OUT/hf/conversion.json`` how the weights were laid out, so that the way back leads to
the same names and files.
"""

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from fairseq_moe.convert.assembling import assembled
from fairseq_moe.convert.directories import appearing, copy_companions
from fairseq_moe.convert.hf.directory import TensorDir, digest_of, read_json
from fairseq_moe.convert.hf.families import FAMILIES, read_keys
from fairseq_moe.convert.hf.file import read_tensor
from fairseq_moe.convert.hf.fp8 import FP8
from fairseq_moe.convert.hf.kinds import fp8_block, is_mxfp4, refuse_other_directories
from fairseq_moe.convert.hf.leftovers import are_other_frequencies, is_leftover, is_leftover_name
from fairseq_moe.convert.hf.names import OurTensor, copied_names, is_fused, mtp_prefix, tensor_table
from fairseq_moe.convert.original_blocks import BlockKeeper
from fairseq_moe.convert.spec import ModelSpec
from fairseq_moe.convert.spec_flags import command_line
from fairseq_moe.convert.store import CHECKPOINT, COMPANIONS, CONVERSION, write_model
from fairseq_moe.data.identity_dictionary import identity_of
from fairseq_moe.errors import CheckpointError
from fairseq_moe.progress import progress

__all__ = ["Conversion", "from_hf"]

_MAX_LISTED = 5


@dataclass(kw_only=True)
class Conversion:
    """Record what a conversion did.

    Args:
        target: what was written.
        spec: what the model is.
        digest: of the tensors on Hugging Face's side, whatever files they lie in.
        num_tensors: on Hugging Face's side.
        num_bytes: of those tensors.
        notes: sentences that the user should read.
    """

    target: Path
    spec: ModelSpec
    digest: str
    num_tensors: int
    num_bytes: int
    notes: list[str] = field(default_factory=list)


def from_hf(
    source: Path,
    target: Path,
    *,
    expert_parallel_size: int = 1,
    fp8_to: torch.dtype = torch.bfloat16,
    ignored_keys: Collection[str] = (),
) -> Conversion:
    """Convert a Hugging Face directory to a checkpoint of ours.

    Args:
        source: directory with config.json and safetensors files.
        target: directory to be made.
        expert_parallel_size: shards over which the experts are spread; any number of ranks reads them.
        fp8_to: dtype of weights that are FP8 or MXFP4 there.
        ignored_keys: keys of config.json that nobody here knows and that the user says change nothing.

    Raises:
        ConfigError: the model is none that we know.
        CheckpointError: the files are not that model, or ``target`` exists.
    """
    refuse_other_directories(source)
    values = read_json(source / "config.json")
    where = str(source / "config.json")
    (spec, carried), block = (
        read_keys(values, source=where, ignored=ignored_keys),
        fp8_block(values, source=where),
    )
    if spec.routing.num_experts % expert_parallel_size:
        raise CheckpointError(
            f"{spec.routing.num_experts} experts do not divide over --expert-parallel-size "
            f"{expert_parallel_size}."
        )
    with appearing(target) as directory:
        tensors = TensorDir.open(source, fp8_block=block, fp8_to=fp8_to, mxfp4=is_mxfp4(values))
        keeper = BlockKeeper(tensors)
        notes = _without_leftovers(spec, tensors) + _without_unread(spec, tensors) + _carried_along(carried)
        spec, more = _without_absent_mtp(spec, tensors)
        notes += more
        table = tensor_table(spec, fused=is_fused(tensors.names()))
        copies = {copy: name for copy, name in copied_names(spec).items() if copy in tensors.stored}
        check_tensors(tensors, table, copies)
        num_bytes = sum(tensor.num_bytes for tensor in tensors.stored.values())
        with progress(f"{source.name} to {target.name}", num_bytes) as advance:
            write_model(
                directory,
                spec=spec,
                tensors=[assembled(tensors, tensor, keeper, advance) for tensor in table],
                num_shards=expert_parallel_size,
            )
        _check_copies(tensors, copies)
        digest = digest_of(
            tensors.digests, {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.stored.items()}
        )
        _write_companions(source, directory, values, spec, tensors, digest, ignored_keys, keeper)
    notes += _missing_end(values, spec) + keeper.notes()
    if block is not None:
        notes.append(
            f"FP8 weights are now {str(fp8_to).removeprefix('torch.')}; the way back does not quantise."
        )
    return Conversion(
        target=target / CHECKPOINT,
        spec=spec,
        digest=digest,
        num_tensors=len(tensors.stored),
        num_bytes=num_bytes,
        notes=notes,
    )


def _carried_along(keys: Sequence[str]) -> list[str]:
    if not keys:
        return []
    return [f"config.json has keys that change nothing here and are carried along: {', '.join(keys)}."]


def _missing_end(values: dict[str, Any], spec: ModelSpec) -> list[str]:
    if identity_of(spec.vocab_size, values).eos is not None:
        return []
    named = values.get("eos_token_id")
    said = (
        "names no eos_token_id"
        if named is None
        else f"has eos_token_id {named!r}, which is no id of the model"
    )
    return [
        f"config.json {said}: generation needs an end token; put its id into dict.txt (eos=ID in place of eos=-)."
    ]


def _without_leftovers(spec: ModelSpec, tensors: TensorDir) -> list[str]:
    """Take out what old releases saved although config.json implies it, and note it."""
    num_layers = spec.num_layers + spec.mtp_layers
    names = sorted(name for name in tensors.stored if is_leftover_name(name, num_layers=num_layers))
    others = []
    for name in names:
        stored = tensors.stored.pop(name)
        tensor = read_tensor(stored)
        if is_leftover(name, tensor, spec):
            continue
        if are_other_frequencies(name, tensor, spec):
            others.append(name)
        else:
            raise CheckpointError(
                f"{stored.path} has {name} of shape {stored.shape} and {stored.dtype}, which is not what config.json "
                "implies; correct config.json, or remove the tensor if the model is right without it."
            )
    if not names:
        return []
    one = "1 tensor of an older release, which follows"
    which = one if len(names) == 1 else f"{len(names)} tensors of older releases, which follow"
    notes = [f"{which} from config.json, left out: {_listed(names)}."]
    if others:
        notes.append(
            f"{_listed(others)}: other values than config.json implies; transformers takes those of config.json, and "
            "so do we."
        )
    return notes


def _without_unread(spec: ModelSpec, tensors: TensorDir) -> list[str]:
    """Take out what published files of a family hold and transformers does not read, and note it."""
    pattern = FAMILIES[spec.family].left_out
    names = [] if pattern is None else sorted(name for name in tensors.stored if re.fullmatch(pattern, name))
    for name in names:
        del tensors.stored[name]
    if not names:
        return []
    return [
        f"{len(names)} tensors of prediction blocks of a form that neither transformers nor we read, left out here and "
        f"on the way back: {_listed(names)}."
    ]


def _without_absent_mtp(spec: ModelSpec, tensors: TensorDir) -> tuple[ModelSpec, list[str]]:
    """Leave out prediction blocks that the files lack: transformers writes none, and yet how many there were."""
    prefix = mtp_prefix(spec, 0)
    if not spec.mtp_layers or any(name.startswith(prefix) for name in tensors.stored):
        return spec, []
    note = f"config.json names {spec.mtp_layers} multi-token prediction blocks, the files hold none."
    return replace(spec, mtp_layers=0), [note]


def check_tensors(tensors: TensorDir, table: Sequence[OurTensor], copies: dict[str, str]) -> None:
    """Refuse missing, surplus and mis-shaped tensors, and parts of one of our tensors that differ in dtype.

    Raises:
        CheckpointError: with their names.
    """
    expected = {block.name: block.shape for tensor in table for block in tensor.blocks}
    expected |= {copy: expected[name] for copy, name in copies.items()}
    found = {name: tensors.shape(name) for name in tensors.names()}
    problems = []
    if missing := [name for name in expected if name not in found]:
        problems.append(f"lacks {_listed(missing)}")
    if surplus := sorted(name for name in found if name not in expected):
        problems.append(f"has {_listed(surplus)}, which the model of its config.json does not have")
    problems += [
        f"has {name} of shape {found[name]}, expected {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ][:_MAX_LISTED]
    for tensor in table:
        dtypes = {tensors.dtype(block.name) for block in tensor.blocks if block.name in found}
        if len(dtypes) > 1:
            problems.append(f"has parts of {tensor.name} in {' and '.join(sorted(map(str, dtypes)))}")
    if problems:
        raise CheckpointError(f"{tensors.path} {'; it '.join(problems)}.")


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return ", ".join(names[:_MAX_LISTED]) + more


def _check_copies(tensors: TensorDir, copies: dict[str, str]) -> None:
    for copy, name in copies.items():
        tensors.read(copy)
        if tensors.digests[copy] != tensors.digests[name]:
            raise CheckpointError(
                f"{copy} of {tensors.path} differs from {name}, of which it should be a copy; this model cannot "
                "be converted."
            )


def _write_companions(
    source: Path,
    directory: Path,
    values: dict[str, Any],
    spec: ModelSpec,
    tensors: TensorDir,
    digest: str,
    ignored_keys: Collection[str],
    keeper: BlockKeeper,
) -> None:
    companions = directory / COMPANIONS
    companions.mkdir()
    copy_companions(source, companions)
    record: dict[str, Any] = {
        "digest": digest,
        "quantized": any(stored.dtype == FP8 for stored in tensors.stored.values()),
        "weight_map": {
            part: stored.path.name for name in tensors.names() for part, stored in tensors.parts(name).items()
        },
    }
    if kept := keeper.write(companions):
        record["mxfp4"] = kept
    if ignored_keys:
        record["ignored_config_keys"] = sorted(ignored_keys)
    (companions / CONVERSION).write_text(json.dumps(record, indent=1), encoding="utf-8")
    (directory / "flags.txt").write_text("\n".join(command_line(spec)) + "\n", encoding="utf-8")
    (directory / "dict.txt").write_text(identity_of(spec.vocab_size, values).text(), encoding="utf-8")
