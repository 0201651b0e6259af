"""The list of expert shards that a main file carries."""

from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from fairseq_moe.errors import CheckpointError

__all__ = ["MANIFEST_KEY", "Manifest", "ShardEntry"]

MANIFEST_KEY = "fairseq_moe"
_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """One shard.

    Args:
        file: path relative to the main file's directory, with forward slashes.
        expert_ids: global ids, in the order of the rows of its tensors.
        num_bytes: size of the file.
        sha256: digest of the file.
    """

    file: str
    expert_ids: list[int]
    num_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What belongs to one checkpoint.

    Args:
        update: optimizer updates done.
        num_experts: E of every MoE layer.
        shards: together they hold every expert once.
    """

    update: int
    num_experts: int
    shards: list[ShardEntry]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the main file."""
        return {"version": _VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, values: Any, *, source: Path) -> "Manifest":
        """Check and read what ``to_dict`` made.

        Raises:
            CheckpointError: another version, missing fields, experts missing or twice, or a path that leaves
            the
                checkpoint's directory.
        """
        try:
            if values["version"] != _VERSION:
                raise CheckpointError(
                    f"{source} has checkpoint format {values['version']}, expected {_VERSION}; use the "
                    "fairseq_moe that wrote it or a newer one."
                )
            shards = [ShardEntry(**entry) for entry in values["shards"]]
            manifest = cls(
                update=int(values["update"]), num_experts=int(values["num_experts"]), shards=shards
            )
            listed = sorted(int(expert) for shard in shards for expert in shard.expert_ids)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the list of expert shards in {source} is damaged ({error}).") from error
        if listed != list(range(manifest.num_experts)):
            raise CheckpointError(
                f"{source} lists experts {listed}, expected each of 0..{manifest.num_experts - 1} once."
            )
        for shard in shards:
            _check_inside(shard.file, source)
        return manifest


def _check_inside(file: str, source: Path) -> None:
    path = PurePosixPath(file)
    if path.is_absolute() or ".." in path.parts or "\\" in file:
        raise CheckpointError(
            f"{source} names the shard {file!r}, which is not a plain path below its directory."
        )
