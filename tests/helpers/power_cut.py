"""Find out what a power cut would leave of files: the bytes and directory entries that have been flushed."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

__all__ = ["PowerCut"]

_TEMPORARY = ".tmp-"  # in the names of files and directories that are not yet what they will be


class PowerCut:
    """Records every ``os.fsync``, ``os.replace`` and ``os.rename``, and what they are called on.

    A killed process cannot show a missing flush: the kernel still has what it wrote. So this compares what is there
    with what each inode held when it was last flushed: a file its bytes, a directory its entries.

    Args:
        monkeypatch: of the test; the functions are themselves again when it ends.
        root: directory below which files are looked at; its own entry counts as flushed.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
        self.root = root
        self.steps: list[str] = []  # "flush NAME" or "rename NAME", in order
        self.early: list[str] = []  # what was renamed before it was flushed
        self.lost_at_rename: dict[
            str, list[str]
        ] = {}  # by the new name: what a power cut just before would take
        self._flushed: dict[int, object] = {}
        fsync, replace, rename = os.fsync, os.replace, os.rename

        def recording_fsync(descriptor: int) -> None:
            fsync(descriptor)
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            self._flushed[path.stat().st_ino] = _held(path)
            self.steps.append(f"flush {path.name}")

        def recording(original: object) -> object:
            def call(source: str | Path, target: str | Path) -> None:
                self.early += self._unflushed(Path(source))
                self.lost_at_rename[Path(target).name] = self.lost()
                original(source, target)  # type: ignore[operator]
                self.steps.append(f"rename {Path(target).name}")

            return call

        monkeypatch.setattr(os, "fsync", recording_fsync)
        monkeypatch.setattr(os, "replace", recording(replace))
        monkeypatch.setattr(os, "rename", recording(rename))

    def lost(self) -> list[str]:
        """List what lies below ``root`` and would not be there after a power cut; temporary names aside."""
        return self._unflushed(self.root)

    def _unflushed(self, top: Path) -> list[str]:
        return [str(path) for path in [top, *_below(top)] if not self._is_flushed(path)]

    def _is_flushed(self, path: Path) -> bool:
        flushed, held = self._flushed.get(path.stat().st_ino), _held(path)
        if isinstance(held, dict):  # entries that are gone by now do no harm
            return not held or (isinstance(flushed, dict) and held.items() <= flushed.items())
        return flushed == held


def _below(top: Path) -> Iterator[Path]:
    if top.is_dir():
        for path in sorted(top.iterdir()):
            if _TEMPORARY not in path.name:
                yield path
                yield from _below(path)


def _held(path: Path) -> object:
    """Read a file's bytes, or a directory's inodes by name."""
    if path.is_dir():
        return {entry.name: entry.stat().st_ino for entry in path.iterdir() if _TEMPORARY not in entry.name}
    return path.read_bytes()
