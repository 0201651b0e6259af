"""Turn settings into the command that trains: derived flags, given ones, and raw ones last.

A derived flag belongs to the keys that it is made of. Where ``flags`` gives the same one, the higher layer counts, and
within a layer ``flags``.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fairseq_moe.launch.job import Profile
from fairseq_moe.launch.layers import Layered
from fairseq_moe.launch.sizes import Sizes
from fairseq_moe.launch.variables import ALLTOALL
from fairseq_moe.planner.reading import SPECIAL_WORDS

__all__ = [
    "data_of",
    "environment_of",
    "profile_of",
    "run_name",
    "starts_from",
    "training_command",
    "uses_wandb",
]

FlagValue = bool | str | tuple[str, ...]

_PRECISION: dict[str, dict[str, FlagValue]] = {
    "bf16": {"bf16": True},
    "fp16": {"memory-efficient-fp16": True},
    "fp32": {},
    "fp8": {"bf16": True, "moe-fp8": "native"},
}


@dataclass(frozen=True, kw_only=True)
class _Derived:
    """Hold a flag that follows from settings.

    Args:
        name: without its dashes.
        value: True: the bare flag.
        keys: the settings that it is made of.
    """

    name: str
    value: FlagValue
    keys: tuple[str, ...]


def training_command(layered: Layered, sizes: Sizes, *, run_dir: Path, has_key: bool) -> tuple[str, ...]:
    """Make the words of the training command, the program first.

    Args:
        layered: all settings.
        sizes: that follow from them.
        run_dir: where checkpoints go.
        has_key: whether the environment has a key for Weights & Biases.
    """
    words = ["fairseq-train"]
    data = data_of(layered)
    if data is not None:
        words.append(data)
    words += layered["training_params"]
    for name, value in _flags(layered, sizes, run_dir=run_dir, has_key=has_key).items():
        words += _spelled(name, value)
    return (*words, *layered.raw_flags)


def _flags(layered: Layered, sizes: Sizes, *, run_dir: Path, has_key: bool) -> dict[str, FlagValue]:
    found: dict[str, FlagValue] = {}
    ranks: dict[str, int] = {}
    for flag in _derived(layered, sizes, run_dir=run_dir, has_key=has_key):
        found[flag.name] = flag.value
        ranks[flag.name] = max((layered.ranks[key] for key in flag.keys), default=0)
    for name, value in layered.map("flags").items():
        if layered.ranks[f"flags.{name}"] >= ranks.get(name, 0):
            found[name] = value
    return found


def _spelled(name: str, value: FlagValue) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}"] if value else []
    return [f"--{name}", *([value] if isinstance(value, str) else value)]


def _flag(name: str, value: object, *keys: str) -> _Derived:
    return _Derived(name=name, value=value if isinstance(value, bool | tuple) else str(value), keys=keys)


def _derived(layered: Layered, sizes: Sizes, *, run_dir: Path, has_key: bool) -> Iterator[_Derived]:
    yield _flag("user-dir", _user_dir(layered), "user_dir", "container")
    if sizes.on_cpu:
        yield _flag("cpu", True, "mode", "gpus_per_node")
    if layered["mode"] == "local":
        yield _flag("distributed-world-size", sizes.num_ranks, "ranks_per_node", "nodes", "mode")
    yield from _data_flags(layered)
    yield from _model_flags(layered)
    yield from _batch_flags(layered, sizes)
    for name, value in _PRECISION[layered["precision"]].items():
        yield _flag(name, value, "precision")
    load_path = starts_from(layered)
    if load_path is not None:
        yield _flag("finetune-from-model", load_path, "load_path", "pretrain")
    yield from _watching_flags(layered, sizes, run_dir, has_key)


def _user_dir(layered: Layered) -> str:
    if layered["user_dir"] is not None:
        return str(layered["user_dir"])
    return "fairseq_moe" if layered["container"] != "none" else str(Path(__file__).resolve().parents[1])


def data_of(layered: Layered) -> str | None:
    """Find the directory of text to train on; None: synthetic data."""
    if layered["data_path"] is not None:
        return str(layered["data_path"])
    found: str | None = layered.map("datasets").get(layered["dataset"])
    return found


def starts_from(layered: Layered) -> str | None:
    """Find the checkpoint that training starts from; None: from random weights."""
    path: str | None = layered["load_path"]
    return None if layered["pretrain"] else path


def _data_flags(layered: Layered) -> Iterator[_Derived]:
    keys = ("data_path", "dataset")
    if data_of(layered) is not None:
        yield _flag("task", "language_modeling", *keys)
        if layered["tokenizer_model"] is not None:
            yield _flag("bpe", "hf_tokenizers", "tokenizer_model")
            yield _flag("hf-tokenizer-json", layered["tokenizer_model"], "tokenizer_model")
    else:
        yield _flag("task", "dummy_lm", *keys)
        yield _flag("disable-validation", True, *keys)
        if layered["vocab_size"] is not None:
            yield _flag("dict-size", layered["vocab_size"] - SPECIAL_WORDS, "vocab_size")
    if layered["seq_len"] is not None:
        yield _flag("tokens-per-sample", layered["seq_len"], "seq_len")


def _model_flags(layered: Layered) -> Iterator[_Derived]:
    for key, name in (("arch", "arch"), ("num_layers", "decoder-layers")):
        if layered[key] is not None:
            yield _flag(name, layered[key], key)
    if layered["tp"] > 1:
        yield _flag("tensor-model-parallel-size", layered["tp"], "tp")
        yield _flag("sequence-parallel", True, "tp")
    for key, name in (("cp", "context"), ("pp", "pipeline")):
        if layered[key] > 1:
            suffix = "parallel-size" if key == "cp" else "model-parallel-size"
            yield _flag(f"{name}-{suffix}", layered[key], key)
    yield from _stage_flags(layered)
    for key, name in (("ep", "expert-model-parallel-size"), ("etp", "expert-tensor-parallel-size")):
        if layered[key] is not None:
            yield _flag(name, layered[key], key)
    if layered["dispatcher"] is not None:
        kind = "alltoall" if layered["dispatcher"] in ALLTOALL else layered["dispatcher"]
        yield _flag("moe-token-dispatcher-type", kind, "dispatcher")
    if layered["grouped_gemm"]:
        yield _flag("moe-grouped-gemm", True, "grouped_gemm")


def _stage_flags(layered: Layered) -> Iterator[_Derived]:
    """Say which layers a stage has; a layer that takes the pipeline away takes what lower ones say of stages along."""

    def counts(key: str) -> bool:
        return layered[key] is not None and (layered["pp"] > 1 or layered.ranks[key] >= layered.ranks["pp"])

    if counts("layers_per_vp") and layered.ranks["layers_per_vp"] >= layered.ranks["vpp"]:
        yield _flag("num-layers-per-virtual-pipeline-stage", layered["layers_per_vp"], "layers_per_vp")
    elif layered["vpp"] > 1 and counts("vpp"):
        yield _flag("num-virtual-stages-per-pipeline-rank", layered["vpp"], "vpp")
    for key in ("first", "last"):
        if counts(f"pp_{key}"):
            yield _flag(f"decoder-{key}-pipeline-num-layers", layered[f"pp_{key}"], f"pp_{key}")


def _batch_flags(layered: Layered, sizes: Sizes) -> Iterator[_Derived]:
    mbs, gbs = layered["mbs"], layered["gbs"]
    if mbs is not None:
        yield _flag("batch-size", mbs, "mbs")
        # stock would round a batch down to a multiple of 8
        yield _flag("required-batch-size-multiple", "1", "mbs")
    if sizes.update_freq is not None:
        yield _flag("update-freq", sizes.update_freq, "gbs", "mbs", "nodes", "tp", "pp", "cp")
    if gbs is not None and layered["train_samples"] is not None:
        yield _flag("max-update", layered["train_samples"] // gbs, "train_samples", "gbs")
    if gbs is not None and layered["warmup_samples"] is not None:
        yield _flag("warmup-updates", -(-layered["warmup_samples"] // gbs), "warmup_samples", "gbs")


def _watching_flags(layered: Layered, sizes: Sizes, run_dir: Path, has_key: bool) -> Iterator[_Derived]:
    yield _flag("save-dir", run_dir / "checkpoints", "output_path", "run_name")
    yield _flag("log-format", "json")
    yield _flag("log-interval", "10")
    if uses_wandb(layered, has_key=has_key):
        yield _flag("wandb-project", layered["wandb_project"], "wandb_project")
    profile = profile_of(layered, sizes)
    if profile.profiler == "none":
        return
    yield _flag("profile-step-start", profile.first_step, "profile_steps")
    yield _flag("profile-step-end", profile.last_step, "profile_steps")
    yield _flag("profile-ranks", tuple(map(str, profile.ranks)), "profile_ranks")
    if profile.profiler == "torch":
        yield _flag("use-pytorch-profiler", True, "profile")


def profile_of(layered: Layered, sizes: Sizes) -> Profile:
    """Say what is profiled; nsys watches GPUs only, and the job script falls back to torch where it is not found."""
    asked = layered["profile"]
    if asked == "0":
        return Profile()
    steps = layered["profile_steps"]
    return Profile(
        profiler="torch" if asked == "torch" or (asked == "1" and sizes.on_cpu) else "nsys",
        first_step=steps[0],
        last_step=steps[-1],
        ranks=layered["profile_ranks"],
    )


def run_name(layered: Layered) -> str:
    """Name a run as ModelZoo does, by its model, axes and batch; without a date, so that a resume finds it."""
    if layered["run_name"] is not None:
        return str(layered["run_name"])
    keys = ("tp", "pp", "ep", "cp", "vpp")
    axes = "".join(f"{key.upper()}{layered[key]}" for key in keys if layered[key] is not None)
    batch = "".join(f"{key.upper()}{layered[key]}" for key in ("mbs", "gbs") if layered[key] is not None)
    parts = (layered["model"] or layered["arch"] or "run", axes, batch, layered["comment"])
    return "-".join(str(part) for part in parts if part)


def uses_wandb(layered: Layered, *, has_key: bool) -> bool:
    """Tell whether the run is logged to Weights & Biases: with a key, or without the network."""
    mode = layered["wandb_mode"] or ("online" if has_key else "disabled")
    return bool(mode != "disabled")


def environment_of(layered: Layered, sizes: Sizes, *, name: str, has_key: bool) -> dict[str, str]:
    """Collect the variables of every rank, of which no value is a secret."""
    found = {}
    if not sizes.on_cpu and (layered["tp"] > 1 or layered["cp"] > 1):
        found["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"  # kernels start in the order in which they were queued
    if uses_wandb(layered, has_key=has_key):
        found["WANDB_NAME"] = name
        found["WANDB_MODE"] = layered["wandb_mode"] or "online"
    return {**found, **layered.map("env")}
