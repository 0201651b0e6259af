"""safetensors files and directories: what is written is what the library writes; what is wrong is named."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fairseq_moe.checkpoint.safetensors_bytes import DTYPES
from fairseq_moe.convert.directories import appearing
from fairseq_moe.convert.hf.directory import INDEX, SINGLE, TensorDir, dequantized
from fairseq_moe.convert.hf.file import SafetensorsWriter, read_header, read_tensor
from fairseq_moe.convert.store import StoredModel
from fairseq_moe.errors import CheckpointError
from tests.helpers.formats import model, write_ours


def _random(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if dtype.is_floating_point:
        return torch.randn(shape).to(dtype)
    return torch.randint(0, 2, shape).to(dtype)


def test_a_file_is_written_byte_for_byte_as_the_library_writes_it(tmp_path: Path) -> None:
    tensors = {
        f"{shape}.{name}": _random(shape, dtype)
        for name, dtype in DTYPES.items()
        for shape in ((3, 5), (2,), (), (0, 4))
    }
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    writer = SafetensorsWriter(
        tmp_path / "ours", {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    )
    writer.write(tensors[name] for name in writer.names)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    header = read_header(tmp_path / "theirs")
    for name, tensor in tensors.items():
        found = read_tensor(header[name])
        assert found.dtype == tensor.dtype
        assert torch.equal(
            found.view(torch.uint8) if found.ndim else found,
            tensor.view(torch.uint8) if tensor.ndim else tensor,
        )
    assert torch.equal(read_tensor(header["(3, 5).F32"].rows(1, 3)), tensors["(3, 5).F32"][1:3])


def _damage_length(data: bytes) -> bytes:
    return (1 << 40).to_bytes(8, "little") + data[8:]


def _overlong(data: bytes) -> bytes:
    return data.replace(b"[0,24]", b"[0,28]")


def _with_header(data: bytes, header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data[-24:]


def _header_with(shape: object = (2, 3), offsets: object = (0, 24)) -> bytes:
    return json.dumps({"w": {"dtype": "F32", "shape": shape, "data_offsets": offsets}}).encode()


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda data: data[:-3], "it is cut off or damaged"),
        (lambda data: data + b"x", "it is cut off or damaged"),
        (lambda data: data[:20], "a header of"),
        (_damage_length, "a header of"),
        (_overlong, "takes bytes 0 to 28"),
        (lambda data: data.replace(b"F32", b"F99"), "has w of dtype 'F99', which fairseq_moe does not read"),
        (lambda data: data.replace(b"F32", b"C64"), "has w of dtype 'C64', which fairseq_moe does not read"),
        (lambda data: data.replace(b'"F32"', b"[ 32]"), "is damaged"),
        (lambda data: _with_header(data, b"[" * 100_000), "is damaged"),
        (lambda data: _with_header(data, _header_with(shape=[2.0, 3])), "has the shape [2.0, 3]"),
        (lambda data: _with_header(data, _header_with(offsets=[0.0, 24])), "takes bytes 0.0 to 24"),
        (lambda data: _with_header(data, _header_with(shape="23")), "has the shape '23'"),
        (lambda data: b"", "a header of"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, damage: Callable[[bytes], bytes], expected: str) -> None:
    save_file({"w": torch.zeros(2, 3)}, tmp_path / SINGLE)
    (tmp_path / SINGLE).write_bytes(damage((tmp_path / SINGLE).read_bytes()))
    with pytest.raises(CheckpointError) as caught:
        TensorDir.open(tmp_path)
    assert expected in str(caught.value)
    assert SINGLE in str(caught.value)


@pytest.mark.parametrize("offsets", [((0, 24), (0, 24)), ((0, 24), (12, 36)), ((0, 24), (28, 52))])
def test_bytes_of_two_tensors_or_of_none_are_refused(
    tmp_path: Path, offsets: tuple[tuple[int, int], ...]
) -> None:
    entries = {
        f"w{index}": {"dtype": "F32", "shape": [2, 3], "data_offsets": place}
        for index, place in enumerate(offsets)
    }
    header = json.dumps(entries).encode()
    data = len(header).to_bytes(8, "little") + header + b"0" * offsets[-1][1]
    (tmp_path / SINGLE).write_bytes(data)
    with pytest.raises(SafetensorError):
        load_file(tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match=r"is damaged .*w1 begins at byte"):
        read_header(tmp_path / SINGLE)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Two shards of two tensors each, and their index."""
    weight_map = {}
    for number, names in ((1, ("a", "b")), (2, ("c", "d"))):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: torch.full((2,), float(number)) for name in names}, tmp_path / file)
        weight_map |= dict.fromkeys(names, file)
    _write_index(tmp_path, weight_map)
    return tmp_path


def _write_index(directory: Path, weight_map: dict[str, str]) -> None:
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _index(directory: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads((directory / INDEX).read_text())["weight_map"]
    return found


def test_tensors_of_shards_are_found(sharded: Path) -> None:
    tensors = TensorDir.open(sharded)
    assert sorted(tensors.names()) == ["a", "b", "c", "d"]
    assert tensors.read("c").tolist() == [2.0, 2.0]


def _remove_shard(path: Path) -> None:
    (path / "model-00002-of-00002.safetensors").unlink()


def _drop_shard_from_index(path: Path) -> None:
    _write_index(path, {name: file for name, file in _index(path).items() if name in "ab"})


def _drop_tensor_from_index(path: Path) -> None:
    _write_index(path, {name: file for name, file in _index(path).items() if name != "d"})


def _add_tensor_to_index(path: Path) -> None:
    _write_index(path, _index(path) | {"e": "model-00001-of-00002.safetensors"})


def _swap_in_index(path: Path) -> None:
    _write_index(path, _index(path) | {"a": "model-00002-of-00002.safetensors"})


def _escape(path: Path) -> None:
    _write_index(path, _index(path) | {"a": "../model.safetensors"})


def _name_no_weights(path: Path) -> None:
    _write_index(path, _index(path) | {"a": "config.json"})


def _add_single_file(path: Path) -> None:
    save_file({"a": torch.zeros(2)}, path / SINGLE)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (_remove_shard, "lacks the shard model-00002-of-00002.safetensors that"),
        (_drop_shard_from_index, "has the shard model-00002-of-00002.safetensors, which"),
        (_drop_tensor_from_index, "model-00002-of-00002.safetensors holds d, which"),
        (_add_tensor_to_index, "lacks e, which"),
        (_swap_in_index, "model-00001-of-00002.safetensors holds a, which"),
        (_escape, "names '../model.safetensors', which is not a file of its directory"),
        (_name_no_weights, "names 'config.json', which is not a file of its directory that ends in"),
        (_add_single_file, f"has both {SINGLE} and {INDEX}, which names"),
        (lambda path: (path / INDEX).write_text("[" * 100_000), "cannot read"),
        (lambda path: (path / INDEX).unlink(), f"neither {SINGLE} nor {INDEX}"),
        (lambda path: (path / INDEX).write_text("{"), "cannot read"),
        (lambda path: (path / INDEX).write_text("{}"), "has no weight_map"),
    ],
)
def test_an_index_that_is_not_true_is_refused(
    sharded: Path, damage: Callable[[Path], object], expected: str
) -> None:
    TensorDir.open(sharded)
    damage(sharded)
    with pytest.raises(CheckpointError) as caught:
        TensorDir.open(sharded)
    assert expected in str(caught.value)


def test_an_index_may_name_the_single_file(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / SINGLE)
    _write_index(tmp_path, {"a": SINGLE})
    assert TensorDir.open(tmp_path).names() == ["a"]


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.float8_e5m2])
def test_weights_that_are_no_weights_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    save_file({"model.norm.weight": torch.ones(2).to(dtype)}, tmp_path / SINGLE)
    with pytest.raises(CheckpointError) as caught:
        TensorDir.open(tmp_path)
    assert f"model.norm.weight of {tmp_path} is {dtype}, expected float32" in str(caught.value)


def test_fp8_blocks_at_the_edges_keep_their_size() -> None:
    weight = torch.randn(40, 23).to(torch.float8_e4m3fn)
    scale = torch.rand(3, 2) + 0.5
    expected = torch.empty(40, 23)
    for row in range(40):
        for column in range(23):
            expected[row, column] = weight[row, column].float() * scale[row // 16, column // 16]
    assert torch.equal(dequantized(weight, scale, block=(16, 16)), expected)


def _save_fp8(path: Path, *, scale: Tensor | None, scale_file: int = 2) -> Tensor:
    """A weight in one shard, its scale in the other."""
    torch.manual_seed(0)
    weight = torch.randn(5, 6).to(torch.float8_e4m3fn)
    contents: dict[int, dict[str, Tensor]] = {
        1: {"w": weight},
        2: {"plain": torch.zeros(2, dtype=torch.bfloat16)},
    }
    if scale is not None:
        contents[scale_file]["w_scale_inv"] = scale
    files = {number: f"model-0000{number}-of-00002.safetensors" for number in contents}
    for number, tensors in contents.items():
        save_file(tensors, path / files[number])
    _write_index(path, {name: files[number] for number, tensors in contents.items() for name in tensors})
    return weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_and_scale_may_lie_in_different_shards(tmp_path: Path, dtype: torch.dtype) -> None:
    scale = torch.rand(2, 2) + 0.5
    weight = _save_fp8(tmp_path, scale=scale)
    tensors = TensorDir.open(tmp_path, fp8_block=(4, 4), fp8_to=dtype)
    assert sorted(tensors.names()) == ["plain", "w"]
    assert tensors.dtype("w") == dtype
    assert torch.equal(tensors.read("w"), dequantized(weight, scale, block=(4, 4)).to(dtype))
    assert tensors.read("plain").dtype == torch.bfloat16
    assert set(tensors.digests) == {"w", "w_scale_inv", "plain"}


@pytest.mark.parametrize(
    ("scale", "block", "expected"),
    [
        (None, (4, 4), "w of {path} is FP8 and has no w_scale_inv"),
        (torch.ones(2, 2), None, "config.json has no quantization_config"),
        (torch.ones(2, 1), (4, 4), "of shape (2, 1), expected float32 or bfloat16 of shape (2, 2)"),
        (
            torch.ones(2, 2, dtype=torch.float16),
            (4, 4),
            "is torch.float16 of shape (2, 2), expected float32",
        ),
    ],
)
def test_fp8_that_cannot_be_understood_is_refused(
    tmp_path: Path, scale: Tensor | None, block: tuple[int, int] | None, expected: str
) -> None:
    _save_fp8(tmp_path, scale=scale)
    with pytest.raises(CheckpointError) as caught:
        TensorDir.open(tmp_path, fp8_block=block)
    assert expected.format(path=tmp_path) in str(caught.value)


def test_a_scale_without_its_weight_is_refused(tmp_path: Path) -> None:
    save_file({"w_scale_inv": torch.ones(1, 1)}, tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match=r"w_scale_inv of .* scales a weight that is not there"):
        TensorDir.open(tmp_path, fp8_block=(4, 4))


def test_rows_read_one_after_the_other_give_the_digest_of_the_whole(tmp_path: Path) -> None:
    save_file({"w": torch.randn(4, 3)}, tmp_path / SINGLE)
    whole, parts = TensorDir.open(tmp_path), TensorDir.open(tmp_path)
    whole.read("w")
    first, second = parts.read("w", rows=(0, 1)), parts.read("w", rows=(1, 4))
    assert torch.equal(torch.cat([first, second]), load_file(tmp_path / SINGLE)["w"])
    assert parts.digests == whole.digests


def test_a_directory_appears_complete_or_not_at_all(tmp_path: Path) -> None:
    with appearing(tmp_path / "new" / "out") as directory:
        (directory / "file").write_text("x")
        assert not (tmp_path / "new" / "out").exists()
    assert (tmp_path / "new" / "out" / "file").read_text() == "x"
    with (
        pytest.raises(CheckpointError, match="there is no trace of it"),
        appearing(tmp_path / "other") as directory,
    ):
        (directory / "absent" / "file").write_text("x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new"]
    with pytest.raises(CheckpointError, match="exists; nothing is overwritten"), appearing(tmp_path / "new"):
        pass
    assert (tmp_path / "new" / "out" / "file").exists()


def test_directories_of_other_processes_are_left_alone(tmp_path: Path) -> None:
    other = tmp_path / f".new.tmp-{os.getpid()}"  # of a process of the same number, on another machine
    other.mkdir()
    (other / "file").write_text("precious")
    with appearing(tmp_path / "new") as directory:
        (directory / "file").write_text("ours")
        with pytest.raises(ZeroDivisionError), appearing(tmp_path / "new"):
            raise ZeroDivisionError
    assert (tmp_path / "new" / "file").read_text() == "ours"
    assert (other / "file").read_text() == "precious"
    assert sorted(tmp_path.iterdir()) == [other, tmp_path / "new"]


def test_directories_have_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "usual").mkdir()
    with appearing(tmp_path / "new"):
        pass
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_checkpoint_without_an_embedding_is_no_model(tmp_path: Path) -> None:
    path = write_ours(tmp_path / "a.pt", {name: t for name, t in model().items() if "embed" not in name})
    with pytest.raises(CheckpointError, match=r"has no decoder\.embed_tokens\.weight, which every model has"):
        StoredModel.open(path)
