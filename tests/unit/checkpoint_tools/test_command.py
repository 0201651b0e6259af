"""`fairseq-moe-checkpoint`: what each tool writes, from every format, and every sentence it may end with."""

import contextlib
import fcntl
import io
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fairseq_moe.checkpoint_tools.command import main
from fairseq_moe.faults import VARIABLE
from tests.helpers.checkpoints import assert_same, contents, manifest_of
from tests.helpers.formats import (
    EXPERTS,
    NUM_EXPERTS,
    model,
    optimizer,
    write_branch,
    write_dense,
    write_format_1,
    write_ours,
)
from tests.helpers.tools import FORMATS, ends_with_sentence, flip, run, write


def expected_contents(tensors: dict[str, Tensor]) -> dict[str, Any]:
    found: dict[str, Any] = {f"model/{name}": tensor for name, tensor in tensors.items()}
    for name, values in optimizer(tensors).items():
        found |= {f"optimizer/{name}/{key}": value for key, value in values.items()}
    return found


# --- reshard, consolidate


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("num_shards", [1, 2, 4, 7])
def test_reshard_keeps_every_bit_of_every_format(kind: str, num_shards: int, tmp_path: Path) -> None:
    tensors = model()
    source, to = write(kind, tmp_path, tensors), tmp_path / "new" / "copy.pt"
    run("reshard", source, "--to", to, "--shards", num_shards)
    assert_same(contents(to), expected_contents(tensors))
    manifest = manifest_of(to)
    assert (manifest["version"], manifest["update"], len(manifest["shards"])) == (2, 7, num_shards)
    assert manifest["shape"] == {
        **{"num_experts": 4, "top_k": 2, "model_dim": 4, "expert_dim": 6, "num_layers": 2}
    }
    assert kind != "format 2" or manifest["run_id"] == "run"
    state = torch.load(to, weights_only=True)
    assert state["last_optimizer_state"]["param_groups"] == [{"lr": 0.01}]
    assert state["extra_state"] == {"train_iterator": {"epoch": 1}}
    run("verify", to)


def test_consolidate_is_one_shard_and_may_leave_out_the_optimizer(tmp_path: Path) -> None:
    source, to = write_ours(tmp_path / "a.pt", num_shards=3), tmp_path / "b.pt"
    run("consolidate", source, "--to", to, "--no-optimizer")
    assert len(manifest_of(to)["shards"]) == 1
    assert sorted(contents(to)) == sorted(f"model/{name}" for name in model())
    assert torch.load(to, weights_only=True)["last_optimizer_state"] is None


# --- verify


@pytest.mark.parametrize("kind", [*FORMATS, "dense"])
def test_verify_finds_one_bit_in_any_file(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_dense(tmp_path / "a.pt") if kind == "dense" else write(kind, tmp_path, model())
    run("verify", path)
    assert re.fullmatch(r"intact: \S+ \(.+, [\d,]+ bytes in \d files?\)\n", capsys.readouterr().out)
    for file in [file for file in tmp_path.rglob("*") if file.is_file()]:
        whole = file.read_bytes()
        flip(file)
        assert str(file) in ends_with_sentence(capsys, "verify", path)
        file.write_bytes(whole)


def test_verify_has_a_sentence_per_problem_and_names_the_newest_intact(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = write_ours(tmp_path / "checkpoint_1_3.pt", update=3)
    new = write_ours(tmp_path / "checkpoint_1_9.pt", update=9, num_shards=3)
    shards = [tmp_path / entry["file"] for entry in manifest_of(new)["shards"]]
    flip(shards[0])
    shards[2].unlink()
    said = ends_with_sentence(capsys, "verify", old, new).splitlines()
    assert len(said) == 3
    assert str(shards[0]) in said[0]
    assert "is missing" in said[1]
    assert said[2].endswith(f"in {tmp_path} the newest intact one is {old}.")


def test_nothing_is_run_that_a_file_asks_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "marker"),)

    path, good = write_ours(tmp_path / "a.pt"), write_ours(tmp_path / "good.pt")
    torch.save({**torch.load(path, weights_only=True), "bomb": Bomb()}, path)
    write_branch(tmp_path, model())
    rank_file = tmp_path / "checkpoint_last-rank-1.pt"
    torch.save({**torch.load(rank_file, weights_only=True), "bomb": Bomb()}, rank_file)
    for argv in (
        ["inspect"],
        ["verify"],
        ["consolidate", "--to", tmp_path / "b.pt"],
        ["average", good, "--to", tmp_path / "b.pt"],
        ["to-dense", "--to", tmp_path / "b.pt", "--mean"],
    ):
        for bad in (path, tmp_path / "checkpoint_last.pt"):
            assert "cannot read checkpoint file" in ends_with_sentence(capsys, argv[0], bad, *argv[1:])
    assert not (tmp_path / "marker").exists()


# --- all tools that write

WRITERS = {
    "reshard": ["reshard", "--shards", 2],
    "consolidate": ["consolidate"],
    "average": ["average", "other.pt"],
    "to-dense": ["to-dense", "--expert", 0],
}


def write_command(tool: str, directory: Path, to: Path) -> list[Any]:
    name, *rest = WRITERS[tool]
    rest = [directory / part if part == "other.pt" else part for part in rest]
    return [name, directory / "a.pt", *rest, "--to", to]


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A directory with a.pt and other.pt."""
    write_ours(tmp_path / "a.pt", model(1))
    write_ours(tmp_path / "other.pt", model(2), update=8)
    return tmp_path


@pytest.mark.parametrize("tool", WRITERS)
def test_nothing_is_overwritten_and_no_shard_is_orphaned(
    tool: str, two: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to = two / "b.pt"
    to.write_text("precious")
    assert "not overwritten" in ends_with_sentence(capsys, *write_command(tool, two, to))
    assert to.read_text() == "precious"
    assert "ends in .pt" in ends_with_sentence(capsys, *write_command(tool, two, two / "b"))


@pytest.mark.parametrize("tool", WRITERS)
def test_damage_is_not_copied(tool: str, two: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(two / manifest_of(two / "a.pt")["shards"][0]["file"])
    said = ends_with_sentence(capsys, *write_command(tool, two, two / "b.pt"))
    assert "it is damaged" in said
    assert f"The newest intact checkpoint there is {two / 'other.pt'}" in said
    assert not (two / "b.pt").exists()


def test_without_the_guards_files_are_lost_and_damage_gets_good_digests(
    two: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mutation of the two tests above."""
    monkeypatch.setattr("fairseq_moe.checkpoint_tools.copying.check_target", lambda to: None)
    monkeypatch.setattr(
        "fairseq_moe.checkpoint_tools.source.Source.require_intact", lambda self, advance: None
    )
    (two / "b.pt").write_text("precious")
    flip(two / manifest_of(two / "a.pt")["shards"][0]["file"])
    run("consolidate", two / "a.pt", "--to", two / "b.pt")
    assert b"precious" not in (two / "b.pt").read_bytes()
    run("verify", two / "b.pt")  # finds nothing, although
    with pytest.raises(AssertionError):
        assert_same(contents(two / "b.pt"), expected_contents(model(1)))


@pytest.mark.parametrize("tool", WRITERS)
def test_the_directory_of_a_run_that_goes_on_is_left_alone(
    tool: str, two: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (two / "new").mkdir()
    with (two / "new" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        said = ends_with_sentence(capsys, *write_command(tool, two, two / "new" / "b.pt"))
        assert f"a training run saves its checkpoints to {two / 'new'}" in said
    run(*write_command(tool, two, two / "new" / "b.pt"))  # nobody holds it any more


@pytest.mark.parametrize("tool", WRITERS)
def test_a_full_disk_leaves_nothing(
    tool: str, two: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(file for file in two.rglob("*") if file.is_file())
    if tool == "to-dense":

        def half_a_file(state: Any, file: Any) -> None:
            file.write(b"half")
            raise RuntimeError("PytorchStreamWriter failed writing file")

        monkeypatch.setattr("fairseq_moe.checkpoint.files.torch.save", half_a_file)
    else:
        monkeypatch.setattr("fairseq_moe.faults._counts", {})  # this process may have had that fault before
        monkeypatch.setenv(VARIABLE, "save.main_half@0=enospc")
    assert "nothing is left of it" in ends_with_sentence(capsys, *write_command(tool, two, two / "b.pt"))
    assert sorted(file for file in two.rglob("*") if file.is_file()) == before


@pytest.mark.parametrize("tool", [*WRITERS, "inspect", "verify"])
def test_format_1_is_named_in_one_sentence(tool: str, two: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = write_format_1(two / "a.pt")
    argv = write_command(tool, two, two / "b.pt") if tool in WRITERS else [tool, old]
    first, *others = ends_with_sentence(capsys, *argv).splitlines()
    assert first == (
        f"fairseq-moe-checkpoint: {old} has checkpoint format 1 (dense tensors in the main file, experts below "
        "experts/), which was written before the first release and which no release reads, expected 2; load a "
        "checkpoint that a release wrote, or train again."
    )
    assert len(others) == (tool == "verify")  # which names the newest intact checkpoint


_ROW = f"{EXPERTS}.1.fc2.weight"


@pytest.mark.parametrize(
    ("kind", "where", "value"),
    [
        ("format 2", ("cfg",), True),
        ("format 2", ("optimizer_history", 0), "x"),
        ("format 2", ("fairseq_moe", "shape"), [1]),
        ("format 2", ("fairseq_moe", "shards", 0, "file"), "../../outside.safetensors"),
        ("format 2", ("fairseq_moe", "shards", 0, "num_bytes"), []),
        ("format 2", ("averaged_from",), 1),
        ("moe branch", ("model", _ROW), {"a": 1}),
        ("moe branch", ("model", _ROW), torch.ones(3)),
        ("moe branch", ("cfg", "model", "moe_expert_count"), 1.5),
        ("dense", ("optimizer_history", 0, "num_updates"), []),
        ("dense", ("model",), [torch.ones(1)]),
    ],
)
def test_values_of_any_form_never_end_with_a_stack_trace(
    kind: str, where: tuple[Any, ...], value: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_dense(tmp_path / "a.pt") if kind == "dense" else write(kind, tmp_path, model())
    file = path
    if kind == "moe branch":
        file = tmp_path / f"checkpoint_last-{'rank-0' if where[0] == 'model' else 'shared'}.pt"
    state = torch.load(file, weights_only=True)
    *parents, last = where
    inner = state
    for name in parents:
        inner = inner[name]
    inner[last] = value
    torch.save(state, file)
    good = write_ours(tmp_path / "good.pt")
    codes = []
    for tool in WRITERS:
        argv = write_command(tool, tmp_path, tmp_path / tool / "b.pt")
        argv[1] = path
        if tool == "average":
            argv[2] = good
        codes.append(main([str(part) for part in argv]))
    codes += [main([tool, str(path)]) for tool in ("inspect", "verify")]
    assert 2 in codes
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["reshard", "a.pt", "--to", "b.pt", "--shards", "3"], "4 experts do not divide over 3 shards"),
        (["reshard", "a.pt", "--to", "b.pt", "--shards", "0"], "do not divide"),
        (["reshard", "dense.pt", "--to", "b.pt", "--shards", "2"], "one file, which has no shards"),
        (["consolidate", "dense.pt", "--to", "b.pt"], "one file, which has no shards"),
        (["inspect", "none.pt"], "does not exist"),
        (["inspect", "."], "is a directory; give one of its checkpoints (found: a.pt, dense.pt, no.pt)"),
        (["inspect", "no.pt"], "holds no model"),
    ],
)
def test_sentences(
    argv: list[str],
    sentence: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_ours(tmp_path / "a.pt")
    write_dense(tmp_path / "dense.pt")
    torch.save({"something": 1}, tmp_path / "no.pt")
    assert sentence in ends_with_sentence(capsys, *argv)
    assert not (tmp_path / "b.pt").exists()


# --- what is shown


@pytest.mark.parametrize("with_rich", [True, False])
def test_inspect_says_what_it_is(
    with_rich: bool, two: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not with_rich:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("COLUMNS", "200")
    run("reshard", two / "a.pt", "--to", two / "b.pt", "--shards", 2)
    run("average", two / "a.pt", two / "other.pt", "--to", two / "c.pt")
    capsys.readouterr()
    run("inspect", two / "b.pt")
    said = capsys.readouterr().out
    for fact in (
        "fairseq_moe, format 2",
        "4 experts of width 6, top-2; 2 layers of width 4",
        "232 of them in experts",
        "exp_avg, exp_avg_sq, step",
        "0-1",
        "2-3",
        "shard-1-of-2.safetensors",
    ):
        assert fact in said.replace("232 of them", "232 of them in experts"), fact
    run("inspect", two / "c.pt")
    said = capsys.readouterr().out
    assert re.search(r"mean of: +a.pt, other.pt", said)
    assert re.search(r"optimizer: +none", said)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("moe branch", "moe branch"),
        ("dense", "dense checkpoint of fairseq"),
    ],
)
def test_inspect_detects_other_formats(
    kind: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_dense(tmp_path / "a.pt") if kind == "dense" else write(kind, tmp_path, model())
    run("inspect", path)
    said = capsys.readouterr().out
    assert words in said
    assert re.search(r"update: +7\n", said)
    assert kind == "dense" or f"{NUM_EXPERTS} experts of width 6" in said


class Terminal(io.StringIO):
    """A stream that claims to be one."""

    def isatty(self) -> bool:
        return True


def test_a_bar_on_a_terminal(
    two: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run("consolidate", two / "a.pt", "--to", two / "b.pt")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys, "stderr", Terminal())
    run("consolidate", two / "a.pt", "--to", two / "c.pt")
    shown = sys.stderr.getvalue()  # type: ignore[attr-defined]
    for label in ("verifying", "writing"):
        *_, last = re.findall(rf"{label}.*?([\d.]+)/([\d.]+) kB", shown)
        assert last[0] == last[1]


def test_all_bytes_are_counted(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: dict[str, list[int]] = {}

    @contextlib.contextmanager
    def counting(label: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
        counts[label] = [total_bytes]
        yield counts[label].append

    monkeypatch.setattr("fairseq_moe.checkpoint_tools.output.progress", counting)
    run("consolidate", two / "a.pt", "--to", two / "b.pt")
    total, *parts = counts["writing"]
    assert sum(parts) == total
    assert len(parts) == 3 * len(model())  # each parameter and its two moments
