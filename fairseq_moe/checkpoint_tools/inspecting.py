"""Describe a checkpoint: facts, and a table of its files."""

from dataclasses import dataclass

from fairseq_moe.checkpoint import ShardContent, has_expert_rows
from fairseq_moe.checkpoint_tools.averaging import AVERAGED_FROM
from fairseq_moe.checkpoint_tools.source import Source
from fairseq_moe.checkpoint_tools.tracking import content_bytes

__all__ = ["Description", "describe"]


@dataclass(frozen=True, kw_only=True)
class Description:
    """The facts and the table of files that ``inspect`` prints.

    Args:
        facts: pairs of name and value.
        files: a row for each file: its name, its experts, its bytes.
    """

    facts: list[tuple[str, str]]
    files: list[tuple[str, str, str]]


def describe(source: Source) -> Description:
    """Describe a checkpoint by its headers, without reading a tensor.

    Raises:
        CheckpointError: a file is missing or is no shard of this checkpoint.
    """
    content = source.content(with_optimizer=source.checkpoint is not None)
    shape = source.shape
    facts = [
        ("file", str(source.path)),
        ("what", source.kind),
        ("update", "not said" if source.update is None else f"{source.update:,}"),
    ]
    if source.run_id is not None:
        facts.append(("run", source.run_id))
    if shape is not None:
        sizes = f"{shape.num_experts} experts of width {shape.expert_dim}, top-{shape.top_k}"
        facts.append(("model", f"{sizes}; {shape.num_layers} layers of width {shape.model_dim}"))
    if AVERAGED_FROM in source.state:
        facts.append(("mean of", ", ".join(map(str, source.state[AVERAGED_FROM]))))
    facts += [
        ("parameters", _parameters(content)),
        ("optimizer", _optimizer(source, content)),
        ("bytes", f"{source.num_bytes:,} in {len(source.files)} files"),
    ]
    return Description(facts=facts, files=_files(source))


def _parameters(content: ShardContent) -> str:
    dense = experts = 0
    types = set()
    for name, tensor in content.model.items():
        size = content_bytes(ShardContent(model={name: tensor})) // tensor.dtype.itemsize
        dense, experts = (dense, experts + size) if has_expert_rows(name) else (dense + size, experts)
        types.add(str(tensor.dtype).removeprefix("torch."))
    share = f", {experts:,} of them in experts" if experts else ""
    return f"{dense + experts:,}{share}; {', '.join(sorted(types))}"


def _optimizer(source: Source, content: ShardContent) -> str:
    if source.checkpoint is None:
        return "none" if not source.state.get("last_optimizer_state") else "in the file"
    if not content.optimizer:
        return "none"
    names = sorted({state for values in content.optimizer.values() for state in values})
    num_bytes = content_bytes(ShardContent(optimizer=content.optimizer))
    return f"{', '.join(names)}; {num_bytes:,} bytes"


def _files(source: Source) -> list[tuple[str, str, str]]:
    experts = {source.path.parent / entry.file: _ranges(entry.expert_ids) for entry in source.entries}
    return [
        (
            str(file.relative_to(source.path.parent)),
            experts.get(file, ""),
            f"{file.stat().st_size:,}" if file.is_file() else "missing",
        )
        for file in source.files
    ]


def _ranges(ids: list[int]) -> str:
    """Abbreviate expert numbers: 0-3, 8 for 0, 1, 2, 3, 8."""
    parts: list[list[int]] = []
    for expert in ids:
        if parts and expert == parts[-1][-1] + 1:
            parts[-1].append(expert)
        else:
            parts.append([expert])
    return ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)
