"""Say what a Hugging Face directory holds: a whole model, plain, FP8 or MXFP4 in blocks, or what is not read.

This comes before any setting is judged: of an adapter or of quantised weights nobody wants to hear that some key is
unknown.
"""

import re
from pathlib import Path
from typing import Any

from fairseq_moe.convert.hf.directory import INDEX, SINGLE, read_json, read_weight_map
from fairseq_moe.convert.hf.file import read_header
from fairseq_moe.errors import CheckpointError, ConfigError

__all__ = ["fp8_block", "is_mxfp4", "refuse_other_directories"]

MXFP4_FAMILIES = {"gpt_oss"}  # published so, and read by transformers
# Notes of quantising tools outside config.json's quantization_config.
_QUANTISER_FILES = {
    "quantize_config.json": "GPTQ",
    "quant_config.json": "AWQ",
    "hf_quant_config.json": "NVIDIA ModelOpt",
}
_QUANTISER_KEYS = {
    "quantization": "MLX",
    "compression_config": "compressed-tensors",
    "bnb_config": "bitsandbytes",
}
_OF_OTHER_PROGRAMS = {
    "*.gguf": "weights of llama.cpp, mostly quantised",
    "*.ggml": "weights of llama.cpp, mostly quantised",
    "*.onnx": "a graph for ONNX",
    "*.npz": "weights of MLX or numpy",
    "*.msgpack": "weights of Flax",
    "*.h5": "weights of TensorFlow",
    "*.distcp": "a distributed checkpoint of a training run",
    "*.nemo": "a checkpoint of NeMo's",
    "latest_checkpointed_iteration.txt": "the note of a checkpoint of Megatron's",
    "consolidated*.safetensors": "weights under other names than transformers'",
}  # fmt: skip
# Patterns of tensors' names, and what such a tensor is a part of: a tool may say nothing in config.json.
_OF_OTHER_TOOLS = {
    r"\.lora_[A-Za-z_]+(\.|$)|\.base_layer\.": "a LoRA adapter",
    r"\.(SCB|absmax|quant_map|nested_\w+|quant_state\..*)$": "weights quantised by bitsandbytes",
    r"\.(qweight|qzeros|g_idx)$": "weights quantised by GPTQ or AWQ",
    r"\.weight_(packed|zero_point|shape|g_idx)$": "weights quantised by compressed-tensors",
    r"\.(weight_scale|input_scale)$": "FP8 weights with one scale per tensor or row",
    r"\.scales$": "weights quantised in groups",
}
_FMTS = ("e4m3", "float8_e4m3fn")  # DeepSeek's and MiniMax's name of one format
_POINTER = b"version https://git-lfs"
_PICKLES = ("pytorch_model*.bin", "*.pth")


def refuse_other_directories(path: Path) -> None:
    """Say what a directory is that holds no whole model in weights of its own.

    Raises:
        CheckpointError: it holds an adapter, quantised weights that we do not read, weights in other formats alone, or
            pointers to weights; or it is no directory.
    """
    if not path.is_dir():
        raise CheckpointError(
            f"{path} is not a directory, and nothing is downloaded here; fetch the model first (hf download NAME "
            "--local-dir DIR) and give DIR."
        )
    has_weights = (path / INDEX).is_file() or (path / SINGLE).is_file()
    _refuse_adapter(path, has_weights)
    values = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    method, where = _quantiser(path, values)
    if method is not None:
        raise CheckpointError(
            f"{path} holds weights quantised by {method}, which are not read here ({where} says so); convert the model "
            "that they were made from (FP8 in blocks, as DeepSeek publishes it, and MXFP4 of gpt_oss are read)."
        )
    if has_weights:
        _refuse_pointers(path)
        _refuse_other_tensors(path)
    else:
        _refuse_other_files(path)


def _refuse_other_files(path: Path) -> None:
    for pattern, what in _OF_OTHER_PROGRAMS.items():
        for file in sorted(path.glob(pattern))[:1]:
            raise CheckpointError(
                f"{path} holds {file.name}, {what}, and no {SINGLE}; convert the model that it was made from."
            )
    pickles = sorted(file.name for pattern in _PICKLES for file in path.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{path} holds its weights in {pickles[0]}, a pickle that would run code when it is loaded, and no "
            f"{SINGLE}; save it as safetensors first (transformers: save_pretrained)."
        )
    for file in sorted(path.glob("*.pt"))[:1]:
        raise CheckpointError(
            f"{path} holds {file.name}, a checkpoint of a training program, which to-hf reads if it is one of ours, "
            f"and no {SINGLE}; from-hf reads what transformers saves."
        )
    for file in sorted(path.glob("*.safetensors"))[:1]:
        raise CheckpointError(
            f"{path} holds {file.name}, a safetensors file, but no {INDEX} that says what lies where, and no {SINGLE}; "
            "fetch the index, or give the file that name if it is the whole model."
        )


def _refuse_pointers(path: Path) -> None:
    for file in sorted(path.glob("*.safetensors")):
        with file.open("rb") as stream:
            if stream.read(len(_POINTER)) == _POINTER:
                raise CheckpointError(
                    f"{file} is a pointer of Git LFS, not the weights themselves; fetch them (git lfs pull)."
                )


def _refuse_other_tensors(path: Path) -> None:
    if (path / INDEX).is_file():
        files = read_weight_map(path / INDEX)
    else:
        files = dict.fromkeys(read_header(path / SINGLE), SINGLE)
    for pattern, what in _OF_OTHER_TOOLS.items():
        for name in (name for name in files if re.search(pattern, name)):
            raise CheckpointError(
                f"{path / files[name]} holds {name}, part of {what}, which is not read here; convert the model before "
                "it was quantised, or merge the adapter first."
            )


def _refuse_adapter(path: Path, has_weights: bool) -> None:
    adapter = path / "adapter_config.json"
    if not adapter.is_file():
        if not has_weights and (path / "adapter_model.safetensors").is_file():
            raise CheckpointError(f"{path} holds an adapter of a model, not the model; {_MERGE}")
        return
    settings = read_json(adapter)
    kind, base = settings.get("peft_type") or "of some kind", settings.get("base_model_name_or_path")
    if has_weights:
        # transformers then loads another model: the adapter's base, and the adapter on top of it.
        raise CheckpointError(
            f"{path} holds weights and an adapter ({kind}) beside them, so nobody can tell which is the model; "
            "remove the files adapter_* if the weights are the whole model, or merge the adapter into its base first."
        )
    raise CheckpointError(
        f"{path} holds an adapter ({kind}) of a model{f', {base}' if base else ''}, not the model; {_MERGE}"
    )


_MERGE = "merge it into its base model first (peft: merge_and_unload) and convert the result."


def _quantiser(path: Path, values: dict[str, Any]) -> tuple[str | None, str]:
    """Name what quantised the weights, and what says so; None: nothing, or a kind that may be read."""
    for key, tool in _QUANTISER_KEYS.items():
        if values.get(key):
            return tool, f"{key} in config.json"
    if (settings := values.get("quantization_config")) is None:
        found = next((file for file in _QUANTISER_FILES if (path / file).is_file()), "")
        return _QUANTISER_FILES.get(found), found
    method = settings.get("quant_method") if isinstance(settings, dict) else settings
    if method is None and any(key.startswith(("load_in_", "bnb_")) for key in settings):
        method = "bitsandbytes"
    is_read = method in (None, "fp8") or is_mxfp4(values)
    return None if is_read else str(method), "quantization_config in config.json"


def is_mxfp4(values: dict[str, Any]) -> bool:
    """Tell whether a config.json says that weights are MXFP4, in the one family that is published so."""
    settings = values.get("quantization_config")
    is_declared = isinstance(settings, dict) and settings.get("quant_method") == "mxfp4"
    return is_declared and values.get("model_type") in MXFP4_FAMILIES


def fp8_block(values: dict[str, Any], *, source: str = "config.json") -> tuple[int, int] | None:
    """Read rows and columns of the blocks of FP8 weights that share a scale; None: no weights are FP8.

    Raises:
        ConfigError: another kind of quantisation.
    """
    settings = values.get("quantization_config")
    if settings is None or is_mxfp4(values):
        return None
    if not isinstance(settings, dict):
        settings = {"quant_method": settings}
    block = settings.get("weight_block_size")
    good_block = isinstance(block, list) and len(block) == 2 and all(type(b) is int and b > 0 for b in block)
    if settings.get("quant_method") != "fp8" or settings.get("fmt", "e4m3") not in _FMTS or not good_block:
        raise ConfigError(
            [
                f"{source} has quantization_config with quant_method {settings.get('quant_method')!r}, fmt "
                f"{settings.get('fmt')!r} and weight_block_size {block!r}, expected fp8, e4m3 and two sizes: quantised "
                "weights are read as FP8 in blocks alone, as DeepSeek publishes them (and MXFP4 of gpt_oss)."
            ]
        )
    assert isinstance(block, list)
    return block[0], block[1]
