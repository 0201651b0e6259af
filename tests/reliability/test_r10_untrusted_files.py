"""R10: no file that a command loads can run anything; it is refused with a sentence that names it.

Payloads are built here: an object whose unpickling makes a directory (the marker), shards that are no safetensors,
headers that lie about their size, and lists of shards that lead elsewhere. Shards and lists are found by looking, so
the tests hold for any version of the format. Programs in flags: ``test_r10_programs_in_flags.py``; further cases:
``tests/distributed/test_checkpoint.py``.
"""

import hashlib
import io
import json
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.ranks import REPOSITORY
from tests.reliability.untrusted import (
    COMMANDS,
    EVAL,
    Copy,
    Payload,
    Spoilt,
    assert_refused,
    attempts,
    change_main,
)

BRANCH = REPOSITORY / "tests" / "golden" / "moe_branch"


def shard_of(main: Path) -> Path:
    return sorted(main.parent.rglob("*.safetensors"))[0]


def replace_shard(main: Path, content: bytes) -> None:
    """Put ``content`` in the place of a shard, and its size and digest into the main file."""
    shard = shard_of(main)
    shard.write_bytes(content)

    def relist(state: dict[str, Any]) -> None:
        (entry,) = (e for e in _shards(state) if e["file"].endswith(shard.name))
        entry |= {"num_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    change_main(main, relist)


def _shards(state: dict[str, Any]) -> list[dict[str, Any]]:
    listed: list[dict[str, Any]] = state["fairseq_moe"]["shards"]
    return listed


def test_a_good_file_loads_everywhere(copy: Copy, text_data: Path) -> None:
    """What the refusals below stand on."""
    found = attempts(text_data, {"good": Spoilt(main=copy("good"), named="", commands=COMMANDS)})
    assert found == {"good": dict.fromkeys((*COMMANDS, "from_pretrained"), "loaded")}


# --- pickles ---


def _whole_file(main: Path, payload: Payload) -> None:
    torch.save(payload, main)


def _plain_pickle(main: Path, payload: Payload) -> None:
    main.write_bytes(pickle.dumps({"model": payload}))


def _old_torch_format(main: Path, payload: Payload) -> None:
    torch.save({"model": payload}, main, _use_new_zipfile_serialization=False)


def _inside(*path: str) -> Callable[[Path, Payload], None]:
    def spoil(main: Path, payload: Payload) -> None:
        def put(state: dict[str, Any]) -> None:
            *parents, last = path
            for name in parents:
                state = state[name]
            state[last] = payload

        change_main(main, put)

    return spoil


PICKLES = {
    "the whole file": _whole_file,
    "a plain pickle": _plain_pickle,
    "the old format of torch": _old_torch_format,
    "beside the model": _inside("something"),
    "in the model": _inside("model", "payload"),
    "as optimizer state": _inside("last_optimizer_state"),
    "in the training state": _inside("extra_state", "train_iterator"),
    "in the flags": _inside("cfg", "model", "activation_fn"),
    "in the list of shards": _inside("fairseq_moe", "shards"),
}


def test_a_malicious_pickle_is_refused_by_every_command(copy: Copy, text_data: Path, marker: Path) -> None:
    files = {}
    for where, spoil in PICKLES.items():
        main = copy(where)
        spoil(main, Payload(marker))
        commands = COMMANDS if where == "beside the model" else COMMANDS[:1]
        files[where] = Spoilt(main=main, named=main, commands=commands)
    assert_refused(text_data, files)
    assert not marker.exists()


def test_these_tests_see_a_payload_that_runs(copy: Copy, text_data: Path, marker: Path) -> None:
    main = copy("spoilt")
    _inside("something")(main, Payload(marker))
    attempts(text_data, {"spoilt": Spoilt(main=main, named="")}, "unpickle everything")
    assert marker.exists()


def test_malicious_files_of_the_branch_are_refused(text_data: Path, tmp_path: Path, marker: Path) -> None:
    files = {}
    for name in ("checkpoint_last-shared.pt", "checkpoint_last-rank-1.pt"):
        shutil.copytree(BRANCH, tmp_path / name)
        spoilt = tmp_path / name / name
        torch.save({**torch.load(spoilt, weights_only=False), "payload": Payload(marker)}, spoilt)
        files[name] = Spoilt(main=tmp_path / name / "checkpoint_last.pt", named=spoilt, commands=EVAL)
    assert_refused(BRANCH / "bin", files)
    assert not marker.exists()


# --- shards ---


def _header(text: bytes, *, length: int | None = None) -> bytes:
    """The start of a safetensors file; ``length``: what it says of the size of its header."""
    return struct.pack("<Q", len(text) if length is None else length) + text


def _lying(**changes: Any) -> bytes:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes
    return _header(json.dumps({"model/w": entry}).encode()) + bytes(8)


def _pickled_shard(marker: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save({"model/w": Payload(marker)}, buffer)
    return buffer.getvalue()


SHARDS: dict[str, Callable[[Path], bytes]] = {
    "a torch file": _pickled_shard,
    "a plain pickle": lambda marker: pickle.dumps(Payload(marker)),
    "nothing": lambda marker: b"",
    "a header of 2^63 bytes": lambda marker: _header(b"{}", length=1 << 63),
    "a header of 200 MB": lambda marker: _header(b"{}", length=200_000_000),
    "a header that is no JSON": lambda marker: _header(b"\x80\x04N."),
    "a tensor beyond the end": lambda marker: _lying(shape=[1 << 40], data_offsets=[0, 1 << 42]),
    "a tensor of negative size": lambda marker: _lying(data_offsets=[8, 0]),
    "a shape that is not its size": lambda marker: _lying(shape=[1 << 40]),
}


def test_a_shard_that_is_something_else_is_refused(copy: Copy, text_data: Path, marker: Path) -> None:
    """Although size and digest are those that the main file names."""
    files = {}
    for what, content in SHARDS.items():
        main = copy(what)
        replace_shard(main, content(marker))
        commands = COMMANDS[:2] if what == "a torch file" else ()
        files[what] = Spoilt(main=main, named=shard_of(main), commands=commands)
    assert_refused(text_data, files)
    assert not marker.exists()


# --- lists of shards ---


def _relist(file: Any) -> Callable[[Path], None]:
    def spoil(main: Path) -> None:
        outside = main.parent.parent / "outside.safetensors"
        shutil.copy(shard_of(main), outside)

        def change(state: dict[str, Any]) -> None:
            (entry,) = (e for e in _shards(state) if e["file"].endswith(shard_of(main).name))
            entry["file"] = file(outside) if callable(file) else file

        change_main(main, change)

    return spoil


LISTS = {
    "parent": _relist("../outside.safetensors"),
    "parent in the middle": _relist("experts/../../outside.safetensors"),
    "absolute": _relist(str),
    "backslashes": _relist("..\\outside.safetensors"),
}


def test_a_list_of_shards_that_leaves_its_directory_is_refused(copy: Copy, text_data: Path) -> None:
    """Although the shard that it leads to is a good one."""
    files = {}
    for what, spoil in LISTS.items():
        main = copy(what)
        spoil(main)
        files[what] = Spoilt(main=main, named=main, commands=COMMANDS[:2] if what == "parent" else ())
    assert_refused(text_data, files)


def _link(main: Path) -> None:
    outside = main.parent.parent / f"{main.parent.name}-outside.safetensors"
    shutil.move(shard_of(main), outside)
    shard = Path(next(e["file"] for e in _shards(torch.load(main, weights_only=True))))
    (main.parent / shard).symlink_to(outside)


LATER: dict[str, Callable[[Path], None]] = {
    "a link": _link,
    "a number": _relist(7),
    "bytes": _relist(b"../outside.safetensors"),
    "a shard without tensors": lambda main: replace_shard(main, _header(b"{}")),
}


def test_further_lists_and_shards_are_refused(copy: Copy, text_data: Path) -> None:
    files = {}
    for what, spoil in LATER.items():
        main = copy(what)
        spoil(main)
        files[what] = Spoilt(main=main, named=main.parent)
    assert_refused(text_data, files)


# --- the other files that commands read ---


def test_the_inspect_tool_reads_no_pickle(
    copy: Copy, marker: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from fairseq_moe.expert_load.command import main as inspect

    main = copy("spoilt")
    torch.save(Payload(marker), main.parent / "moe_load.jsonl")
    torch.save(Payload(marker), main)
    for path in (main.parent, main):
        assert inspect([str(path)]) == 1
    assert not marker.exists()
    assert "is not a load record" in capsys.readouterr().err
