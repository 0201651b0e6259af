"""The file format by itself: what is written comes back, by any part; what is not understood is refused."""

import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fairseq_moe.checkpoint import (
    MANIFEST_KEY,
    Checkpoint,
    LazyTensor,
    ModelShape,
    SetId,
    ShardContent,
    share_of,
    split_key,
    write_checkpoint,
    write_shard,
)
from fairseq_moe.errors import CheckpointError
from tests.helpers.checkpoints import EXPERTS, small_checkpoint, small_content

EMBEDDING = "decoder.embed_tokens.weight"


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(small_checkpoint(tmp_path / "a.pt", num_shards=4))
    checkpoint.verify()
    written = small_content(4)
    model, optimizer = checkpoint.load(expert_ids=range(4), with_optimizer=True)
    assert model.keys() == written.model.keys() | written.aliases.keys()
    for name, tensor in written.model.items():
        assert torch.equal(model[name], tensor)
        assert model[name].dtype == tensor.dtype
    assert model["decoder.output_projection.weight"] is model[EMBEDDING]
    assert optimizer.keys() == written.optimizer.keys()
    for name, values in written.optimizer.items():
        assert optimizer[name]["step"] == 7
        assert torch.equal(optimizer[name]["exp_avg_sq"], values["exp_avg_sq"])
    assert checkpoint.state["model"] == {}
    assert checkpoint.manifest.shape == ModelShape(
        num_experts=4, top_k=2, model_dim=4, expert_dim=3, num_layers=2
    )


@pytest.mark.parametrize("ids", [[0], [3, 1], [2, 3], [1, 3, 0, 2], []])
def test_any_experts_in_any_order(ids: list[int], tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(small_checkpoint(tmp_path / "a.pt", num_shards=2))
    lazy = checkpoint.tensor(f"optimizer/{EXPERTS}/exp_avg", ids)
    assert lazy.shape == (len(ids), 3, 4)
    assert torch.equal(lazy.load(), small_content(4).optimizer[EXPERTS]["exp_avg"][ids])


def test_safetensors_reads_a_shard_by_itself(tmp_path: Path) -> None:
    main = small_checkpoint(tmp_path / "a.pt", num_shards=1)
    (entry,) = Checkpoint.open(main).manifest.shards
    found = load_file(tmp_path / entry.file)
    assert torch.equal(found[f"model/{EMBEDDING}"], small_content(4).model[EMBEDDING])
    assert {split_key(key)[0] for key in found} == small_content(4).model.keys()


@pytest.mark.parametrize(
    "tensor",
    [
        *(
            torch.arange(6).to(dtype).view(2, 3)
            for dtype in (torch.bool, torch.uint8, torch.float16, torch.float64)
        ),
        torch.randn(3, 2).t(),
        torch.tensor(5.0),
        torch.zeros(0, 3),
        torch.arange(4.0).to(torch.float8_e4m3fn),
    ],
    ids=lambda tensor: f"{tensor.dtype}-{tuple(tensor.shape)}",
)
def test_kinds_of_tensors(tensor: Tensor, tmp_path: Path) -> None:
    content = ShardContent(model={"x": tensor, "y": torch.ones(3)})
    entry = write_shard(tmp_path, SetId.new(run_id=None, update=0), index=0, num_shards=1, content=content)
    found = load_file(tmp_path / entry.file)["model/x"]
    assert found.dtype == tensor.dtype
    assert torch.equal(found.float(), tensor.float())
    assert entry.num_bytes == (tmp_path / entry.file).stat().st_size


def test_what_cannot_be_stored_is_refused_and_leaves_no_file(tmp_path: Path) -> None:
    set_id = SetId.new(run_id=None, update=0)
    for content, said in (
        (ShardContent(model={"x": torch.zeros(2, dtype=torch.complex64)}), "safetensors files cannot hold"),
        (
            ShardContent(expert_ids=[0, 1], model={EXPERTS: torch.zeros(3, 2)}),
            "expected one row for each of 2",
        ),
    ):
        with pytest.raises(CheckpointError, match=said):
            write_shard(tmp_path, set_id, index=0, num_shards=1, content=content)
    assert not list(tmp_path.rglob("*.*"))


def test_copying_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    source = Checkpoint.open(small_checkpoint(tmp_path / "a.pt"))
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def watched(lazy: LazyTensor) -> LazyTensor:
        def load() -> Tensor:
            nonlocal most
            tensor = lazy.load()
            alive.append(weakref.ref(tensor))
            most = max(most, sum(reference() is not None for reference in alive))
            return tensor

        return LazyTensor(dtype=lazy.dtype, shape=lazy.shape, load=load)

    (content,) = source.split(1)
    content.model = {name: watched(tensor) for name, tensor in content.model.items()}  # type: ignore[arg-type]
    write_checkpoint(
        tmp_path / "b.pt",
        state=source.state,
        run_id=None,
        update=1,
        shape=source.manifest.shape,
        contents=[content],
        num_shards=1,
    )
    assert len(alive) == len(small_content(4).model)
    assert most <= 2  # the one that is written, and the next


def test_every_tensor_has_one_writer_and_writers_have_equal_work() -> None:
    sizes = {f"decoder.{number}": 10 + number for number in range(40)}
    aliases = {"tied": "decoder.3"}
    writes = [
        share_of(index, expert_bytes=[300, 300, 0, 0], dense_bytes=sizes, aliases=aliases)
        for index in range(4)
    ]
    writers = {name: [write(name) for write in writes].index(True) for name in sizes}
    assert all(sum(write(name) for write in writes) == 1 for name in [*sizes, "tied"])
    assert writes[writers["decoder.3"]]("tied")
    assert [write(EXPERTS) for write in writes] == [True, True, False, False]
    loads = [300, 300, 0, 0]
    for name, writer in writers.items():
        loads[writer] += sizes[name]
    assert max(loads) - min(loads) <= max(sizes.values())


def change_manifest(main: Path, change: Callable[[dict[str, Any]], None]) -> None:
    state = torch.load(main, weights_only=True)
    change(state[MANIFEST_KEY])
    torch.save(state, main)


def set_file(file: str) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        for entry in manifest["shards"]:
            entry["file"] = file

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m.update(version=3), "has checkpoint format 3, expected 2"),
        (lambda m: m.update(version="2"), "has checkpoint format '2', expected 2"),
        (lambda m: m.update(version=1), "has checkpoint format 1 .*no release reads, expected 2"),
        (lambda m: m.pop("run_id"), "the list of shards in .* is damaged"),
        (lambda m: m["shards"][0].pop("sha256"), "the list of shards in .* is damaged"),
        (lambda m: m.update(shards=3), "the list of shards in .* is damaged"),
        (lambda m: m["shards"].pop(), r"lists experts \[0, 1\], expected each of 0..3 once"),
        (lambda m: m["shards"][0].update(expert_ids=[0, 0]), r"lists experts \[0, 0, 2, 3\]"),
        (lambda m: m["shards"].append(m["shards"][0]), r"lists experts \[0, 0, 1, 1, 2, 3\], expected each"),
        (set_file("/etc/x/passwd"), "not a plain path below its directory"),
        (set_file("shards/../../x"), "not a plain path below its directory"),
        (set_file("shards/a\\b/x"), "not a plain path below its directory"),
        (set_file("x"), "not a plain path below its directory"),
    ],
)
def test_a_list_of_shards_that_makes_no_sense_is_refused(change: Any, said: str, tmp_path: Path) -> None:
    main = small_checkpoint(tmp_path / "a.pt")
    change_manifest(main, change)
    with pytest.raises(CheckpointError, match=said):
        Checkpoint.open(main)


@pytest.mark.parametrize("what", ["shard", "set", "directory"])
def test_links_are_not_followed(what: str, tmp_path: Path) -> None:
    main = small_checkpoint(tmp_path / "a.pt")
    shard = tmp_path / Checkpoint.open(main).manifest.shards[0].file
    step = {"shard": shard, "set": shard.parent, "directory": shard.parent.parent}[what]
    step.rename(tmp_path / "elsewhere")
    step.symlink_to(tmp_path / "elsewhere")
    for read in (Checkpoint.verify, Checkpoint.keys):
        with pytest.raises(CheckpointError, match=f"is reached by the symbolic link {step}"):
            read(Checkpoint.open(main))


def test_optimizer_state_that_differs_between_shards_cannot_be_merged(tmp_path: Path) -> None:
    contents = [
        ShardContent(
            expert_ids=[e], model={EXPERTS: torch.zeros(1, 2)}, optimizer={EXPERTS: {"scale": float(e)}}
        )
        for e in range(2)
    ]
    write_checkpoint(
        tmp_path / "a.pt",
        state={},
        run_id=None,
        update=1,
        shape=ModelShape(num_experts=2, top_k=1, model_dim=2, expert_dim=1, num_layers=1),
        contents=contents,
        num_shards=2,
    )
    checkpoint = Checkpoint.open(tmp_path / "a.pt")
    assert checkpoint.load(expert_ids=[1], with_optimizer=False)[1] == {}
    with pytest.raises(CheckpointError, match="differs between shards and cannot be merged"):
        checkpoint.load(expert_ids=[0, 1], with_optimizer=True)


def test_the_format_needs_neither_fairseq_nor_other_ranks() -> None:
    known, seen, waiting = {"checkpoint", "errors", "faults"}, set(), ["checkpoint"]
    package = Path(__file__).resolve().parents[3] / "fairseq_moe"
    while waiting:
        unit = waiting.pop()
        seen.add(unit)
        for path in (package / unit).glob("*.py") if (package / unit).is_dir() else [package / f"{unit}.py"]:
            imported = re.findall(
                r"^\s*(?:from|import) ([\w.]+)", path.read_text(encoding="utf-8"), re.MULTILINE
            )
            assert not [
                name for name in imported if name.split(".")[0] == "fairseq" or ".distributed" in name
            ], path
            waiting += {name.split(".")[1] for name in imported if name.startswith("fairseq_moe.")} - seen
    assert seen == known
