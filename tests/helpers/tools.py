"""Run the tools for checkpoints in this process, and damage what they read."""

import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from fairseq_moe.checkpoint_tools.command import main
from tests.helpers.formats import write_branch, write_ours

__all__ = ["FORMATS", "ends_with_sentence", "flip", "run", "write"]

FORMATS = ["format 2", "moe branch", "moe branch, -shardN"]


def write(kind: str, directory: Path, tensors: dict[str, Tensor]) -> Path:
    """Write a checkpoint of that kind; returns the path that one would type."""
    if kind == "format 2":
        return write_ours(directory / "checkpoint_last.pt", tensors, num_shards=2)
    return write_branch(directory, tensors, suffix="" if kind == "moe branch" else "-shard0")


def ends_with_sentence(capsys: pytest.CaptureFixture[str], *argv: Any) -> str:
    """Run a command that must end with exit code 2; returns what it says on stderr."""
    assert main([str(part) for part in argv]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert said.startswith("fairseq-moe-checkpoint: ")
    return said


def run(*argv: Any) -> None:
    """Run a command that must end with exit code 0."""
    assert main([str(part) for part in argv]) == 0


def flip(file: Path) -> None:
    """Change one bit of a tensor: in the middle of the file, or of the largest record of a zip archive."""
    data = bytearray(file.read_bytes())
    place = len(data) // 2
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            largest = max(archive.infolist(), key=lambda record: record.file_size)
        name_and_extra = data[largest.header_offset + 26 : largest.header_offset + 30]
        header = 30 + sum(struct.unpack("<HH", name_and_extra))
        place = largest.header_offset + header + largest.file_size // 2
    data[place] ^= 1
    file.write_bytes(data)
