"""Read checkpoints of fairseq's moe branch: ``NAME-shared.pt`` and ``NAME-rank-<r>.pt``, both maybe ``-shard<r>``.

The shared file holds the dense part, each rank file the experts of one rank under local numbers. Names and
numbers become ours here: the gate's matrix is the router's weight, expert j of file r is global expert
r * L + j, and the matrices of a layer's experts are stacked.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fairseq_moe.checkpoint.files import load_plain
from fairseq_moe.errors import CheckpointError

__all__ = ["BranchCheckpoint", "ExpertRows", "ExpertState", "find_branch_checkpoint"]

# (model tensors by parameter name, optimizer state by parameter name and state name)
ExpertState = tuple[dict[str, Tensor], dict[str, dict[str, Any]]]
# The same, with one more level: the global id of an expert.
ExpertRows = tuple[dict[str, dict[int, Tensor]], dict[str, dict[str, dict[int, Any]]]]

_FILE = re.compile(r"(?P<stem>.+?)-(shared|rank-\d+)(?P<shard>-shard\d+)?\.pt")
_EXPERT = re.compile(
    r"(?P<prefix>.+\.moe_layer\.experts)\.(?P<local>\d+)\.(?P<matrix>fc1|fc2)\.(?P<kind>weight|bias)"
)


def find_branch_checkpoint(path: Path) -> "BranchCheckpoint | None":
    """Find the branch checkpoint that ``path`` names: by its plain name, its shared file or one of its rank files."""
    match = _FILE.fullmatch(path.name)
    stem = match["stem"] if match else path.name.removesuffix(".pt")
    for shared_suffix, rank_suffix in (("", ""), ("-shard0", "-shard*")):
        shared = path.with_name(f"{stem}-shared{shared_suffix}.pt")
        if shared.is_file():
            number = re.compile(re.escape(stem) + r"-rank-(\d+)(-shard\d+)?\.pt")
            files = {
                int(found[1]): file
                for file in path.parent.glob(f"{_escaped(stem)}-rank-*{rank_suffix}.pt")
                if (found := number.fullmatch(file.name)) and (found[2] is not None) == bool(rank_suffix)
            }
            return BranchCheckpoint(shared=shared, rank_files=_in_order(files, shared))
    return None


def _escaped(stem: str) -> str:
    return re.sub(r"([\[\]*?])", r"[\1]", stem)


def _in_order(files: dict[int, Path], shared: Path) -> list[Path]:
    missing = sorted(set(range(max(files, default=0) + 1)) - set(files))
    if missing:
        raise CheckpointError(
            f"{shared} lacks its rank files {missing}; copy all NAME-rank-N.pt files beside it."
        )
    return [files[number] for number in range(len(files))]


@dataclass(frozen=True, kw_only=True)
class BranchCheckpoint:
    """The files of one checkpoint of the branch, in the order of ranks.

    Args:
        shared: the dense part.
        rank_files: the experts, in rank order.
    """

    shared: Path
    rank_files: list[Path]

    def adopt_dense(self, state: dict[str, Any], *, with_optimizer: bool) -> dict[str, dict[str, Any]]:
        """Give the loaded shared file's tensors our names; returns its optimizer state by parameter name."""
        state["model"] = {_dense_name(name): tensor for name, tensor in state["model"].items()}
        return self._named(state, list(state["model"])) if with_optimizer else {}

    def experts(self, *, num_experts: int, expert_ids: Sequence[int], with_optimizer: bool) -> ExpertState:
        """Read the given experts, stacked as our expert parameters are.

        Args:
            num_experts: E.
            expert_ids: global ids, in this order.
            with_optimizer: read optimizer state too.
        """
        model, optimizer = self.expert_rows(
            num_experts=num_experts, expert_ids=expert_ids, with_optimizer=with_optimizer
        )
        return (
            {name: torch.stack([rows[expert] for expert in expert_ids]) for name, rows in model.items()},
            {
                name: {key: _stacked([rows[expert] for expert in expert_ids]) for key, rows in values.items()}
                for name, values in optimizer.items()
            },
        )

    def expert_rows(
        self, *, num_experts: int, expert_ids: Sequence[int], with_optimizer: bool, lazily: bool = False
    ) -> ExpertRows:
        """Read the given experts one by one, not stacked: by parameter (and state), then by expert.

        Args:
            num_experts: E.
            expert_ids: global ids; others that lie in the same files come along.
            with_optimizer: read optimizer state too.
            lazily: map the files instead of reading them.
        """
        per_file = max(num_experts // len(self.rank_files), 1)  # more files than experts: replicas follow
        model: dict[str, dict[int, Tensor]] = {}
        optimizer: dict[str, dict[str, dict[int, Any]]] = {}
        for number, file in enumerate(self.rank_files):
            if not any(expert // per_file == number for expert in expert_ids):
                continue
            state = load_plain(file, lazily=lazily)
            named = self._named(state, list(state["model"])) if with_optimizer else {}
            for name, tensor in state["model"].items():
                stack, expert = self._place(name, number * per_file)
                model.setdefault(stack, {})[expert] = tensor
                for key, value in named.get(name, {}).items():
                    optimizer.setdefault(stack, {}).setdefault(key, {})[expert] = value
        states = [rows for values in optimizer.values() for rows in values.values()]
        for rows in [*model.values(), *states] or [{}]:
            missing = sorted(set(expert_ids) - set(rows))
            if missing:
                raise CheckpointError(
                    f"expert {missing[0]} is in none of the rank files beside {self.shared}."
                )
        return model, optimizer

    def _place(self, name: str, first_expert: int) -> tuple[str, int]:
        match = _EXPERT.fullmatch(name)
        if match is None:
            raise CheckpointError(
                f"the rank files of {self.shared} hold {name}, which is not an expert's matrix."
            )
        return f"{match['prefix']}.{match['matrix']}_{match['kind']}", first_expert + int(match["local"])

    def _named(self, state: dict[str, Any], names: list[str]) -> dict[str, dict[str, Any]]:
        """Name optimizer state, which the branch numbers in the order of the model, skipping tied parameters."""
        saved = (state.get("last_optimizer_state") or {}).get("state", {})
        if not saved:
            return {}
        shapes = {name: tensor.shape for name, tensor in state["model"].items()}
        names = [name for name in names if not name.endswith(("version", "_float_tensor"))]
        tied = len(names) - len(saved)
        if tied and names[-1].endswith("output_projection.weight"):
            names = names[:-1]
        numbered = dict(zip(names, (saved[index] for index in sorted(saved)), strict=False))
        fits = len(names) == len(saved) and all(
            not isinstance(value, Tensor) or value.shape == shapes[name]
            for name, values in numbered.items()
            for value in values.values()
        )
        if not fits:
            raise CheckpointError(
                f"the optimizer state beside {self.shared} does not match its parameters one to one (it was "
                "sharded or written by another optimizer) and cannot be read; pass --reset-optimizer to "
                "load the weights alone."
            )
        return numbered


def _dense_name(name: str) -> str:
    return name.replace(".moe_layer.gate.wg.weight", ".moe_layer.router.weight")


def _stacked(values: list[Any]) -> Any:
    return torch.stack(values) if isinstance(values[0], Tensor) else values[0]
