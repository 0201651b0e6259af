"""Describe a checkpoint in its main file: shards with sizes and digests, run, update, and sizes of the model."""

from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from fairseq_moe.errors import CheckpointError

__all__ = ["MANIFEST_KEY", "Manifest", "ModelShape", "ShardEntry"]

MANIFEST_KEY = "fairseq_moe"
_VERSION = 2


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """One shard as the manifest lists it.

    Args:
        file: path relative to the main file's directory, with forward slashes.
        expert_ids: global ids of the experts in it, in the order of the rows of its expert tensors.
        num_bytes: size of the file.
        sha256: digest of the file, hexadecimal.
    """

    file: str
    expert_ids: list[int]
    num_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes that decide whether a checkpoint fits a model.

    Args:
        num_experts: E of every MoE layer.
        top_k: K, experts per token.
        model_dim: D, width of the model.
        expert_dim: F, hidden width of an expert.
        num_layers: of the decoder, dense layers included.
    """

    num_experts: int
    top_k: int
    model_dim: int
    expert_dim: int
    num_layers: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The list of the shards of one checkpoint, and what run, update and model they belong to.

    Args:
        version: of the format.
        run_id: of the training run, kept by resumed ones.
        update: optimizer updates done.
        shape: of the model.
        shards: together they hold every expert once; those of a pipeline's stages, which have other layers, once each.
    """

    version: int = _VERSION
    run_id: str
    update: int
    shape: ModelShape
    shards: list[ShardEntry]

    @property
    def set_dir(self) -> str:
        """Name the set by the directory of its shards, relative to that of the main file."""
        return str(PurePosixPath(self.shards[0].file).parent)

    @property
    def num_bytes(self) -> int:
        """Add up the sizes of all shards."""
        return sum(entry.num_bytes for entry in self.shards)

    def to_dict(self) -> dict[str, Any]:
        """Convert to the plain values that the main file holds."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any, *, source: Path) -> "Manifest":
        """Check and read what ``to_dict`` made.

        Raises:
            CheckpointError: another version, missing fields, experts missing or twice, or a path that leaves
                the checkpoint's directory.
        """
        try:
            if (version := values["version"]) != _VERSION:
                raise _other_format(source, version)
            manifest = cls(
                run_id=values["run_id"],
                update=int(values["update"]),
                shape=ModelShape(**values["shape"]),
                shards=[ShardEntry(**entry) for entry in values["shards"]],
            )
            manifest._check(source)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the list of shards in {source} is damaged ({error}).") from error
        return manifest

    def _check(self, source: Path) -> None:
        listed = sorted(int(expert) for entry in self.shards for expert in entry.expert_ids)
        num_experts = self.shape.num_experts
        # Which stages a pipeline had, only the tensors say; reading one finds each expert of it once, or complains.
        stages = max(1, len(listed) // max(1, num_experts))
        if listed != sorted([*range(num_experts)] * stages):
            raise CheckpointError(
                f"{source} lists experts {listed}, expected each of 0..{num_experts - 1} once, or once for each "
                "stage of a pipeline."
            )
        for entry in self.shards:
            if not isinstance(entry.num_bytes, int) or not isinstance(entry.sha256, str):
                raise TypeError(f"{entry.file} has size {entry.num_bytes!r} and digest {entry.sha256!r}")
            path = PurePosixPath(entry.file)
            if path.is_absolute() or ".." in path.parts or "\\" in entry.file or len(path.parts) != 3:
                raise CheckpointError(
                    f"{source} names the shard {entry.file!r}, which is not a plain path below its directory."
                )
        if len({str(PurePosixPath(entry.file).parent) for entry in self.shards}) != 1:
            raise CheckpointError(f"{source} names shards of several sets, expected one.")


def _other_format(source: Path, version: Any) -> CheckpointError:
    if version == 1:
        return CheckpointError(
            f"{source} has checkpoint format 1 (dense tensors in the main file, experts below experts/), which was "
            f"written before the first release and which no release reads, expected {_VERSION}; load a checkpoint "
            "that a release wrote, or train again."
        )
    return CheckpointError(
        f"{source} has checkpoint format {version!r}, expected {_VERSION}; use the fairseq_moe that wrote it or a "
        "newer one."
    )
