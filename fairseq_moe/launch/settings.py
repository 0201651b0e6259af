"""Declare the settings of a job, by key, and read their values from words or YAML.

``SETTINGS`` is the one list: which kind of value a key takes, what it means, and which values there are. Keys of maps
are written with a dot: ``flags.lr``, ``env.NCCL_DEBUG``, ``datasets.wiki``.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["MAPS", "SETTINGS", "Setting", "key_problem", "read_value"]

Kind = Literal["number", "numbers", "text", "path", "switch", "words", "paths"]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Describe one key of settings.

    Args:
        kind: of its value; a path, and each of several, may hold ``${VARIABLE}``.
        text: what it means.
        default: built in.
        choices: all there are; empty: any.
        least: smallest number.
    """

    kind: Kind
    text: str
    default: Any = None
    choices: tuple[str, ...] = ()
    least: int = 1


def _number(text: str, default: int | None = None, *, least: int = 1) -> Setting:
    return Setting(kind="number", text=text, default=default, least=least)


def _text(text: str, default: str | None = None, *choices: str) -> Setting:
    return Setting(kind="text", text=text, default=default, choices=choices)


def _path(text: str, default: str | None = None) -> Setting:
    return Setting(kind="path", text=text, default=default)


def _switch(text: str, default: bool | None = None) -> Setting:
    return Setting(kind="switch", text=text, default=default)


def _words(text: str, *default: str) -> Setting:
    return Setting(kind="words", text=text, default=default)


def _numbers(text: str, *default: int) -> Setting:
    return Setting(kind="numbers", text=text, default=default)


def _paths(text: str) -> Setting:
    return Setting(kind="paths", text=text, default=())


SETTINGS: dict[str, Setting] = {
    # where further values are read from
    "recipe": _path("name of a recipe (--list shows them), or path of a YAML file"),
    "cluster": _path("name of a cluster file, or path of one"),
    "run": _path("path of a YAML file about this run"),
    # model and data
    "model": _text("what the run's name says that is trained"),
    "arch": _text("--arch"),
    "vocab_size": _number("words of the synthetic data, 4 special ones included", least=5),
    "num_layers": _number("--decoder-layers (default: those of the arch)"),
    "data_path": _path("directory of preprocessed text; without any, synthetic data (--task dummy_lm)"),
    "dataset": _text("name in datasets of the directory to train on"),
    "tokenizer_model": _path("tokenizer.json that the text was made with; noted in checkpoints"),
    # axes
    "tp": _number("--tensor-model-parallel-size, with --sequence-parallel", 1),
    "pp": _number("--pipeline-model-parallel-size", 1),
    "cp": _number("--context-parallel-size", 1),
    "ep": _number("--expert-model-parallel-size (default: as many as there can be)"),
    "etp": _number("--expert-tensor-parallel-size (default: tp)"),
    "vpp": _number("--num-virtual-stages-per-pipeline-rank", 1),
    "layers_per_vp": _number("--num-layers-per-virtual-pipeline-stage, in place of vpp"),
    "pp_first": _number("--decoder-first-pipeline-num-layers"),
    "pp_last": _number("--decoder-last-pipeline-num-layers"),
    # training
    "mbs": _number("sequences of a micro-batch: --batch-size"),
    "gbs": _number("sequences of an update, over all ranks; gives --update-freq"),
    "seq_len": _number("--tokens-per-sample"),
    "train_samples": _number("sequences of the whole training; gives --max-update"),
    "warmup_samples": _number("sequences of the warm-up; gives --warmup-updates", least=0),
    "precision": _text(
        "bf16, fp16, fp32, or fp8 (bf16 with experts in FP8)", "bf16", "bf16", "fp16", "fp32", "fp8"
    ),
    "dispatcher": _text(
        "alltoall or allgather", None, "alltoall", "allgather", "alltoall_seq", "flex", "deepep", "hybridep"
    ),
    "grouped_gemm": _switch("accepted from ModelZoo: the expert kernel is chosen by device, dtype and sizes"),
    "pretrain": _switch("start from random weights; false: from load_path (default: false with a load_path)"),
    "load_path": _path("checkpoint to start from, with a new optimizer (--finetune-from-model)"),
    "training_params": _words("flags of fairseq-train that all others override"),
    # where and how long
    "mode": _text(
        "sbatch, interactive (torchrun) or local (CPU)", "sbatch", "sbatch", "interactive", "local"
    ),
    "nodes": _number("machines", 1),
    "ranks_per_node": _number("processes on each (default: a GPU each; on CPUs 1)"),
    "run_time": _text("time limit as HH:MM:SS or D-HH:MM:SS"),
    "lead_sec": _number("seconds before the time limit at which a save begins", 600),
    "requeue": _switch("start again after a job that was ended by its limit and has saved", False),
    "max_restarts": _number("how often at most", 3, least=0),
    "chain": _number("jobs, each after the one before", 1),
    "output_path": _path("directory of run directories", "runs"),
    "run_name": _text("name of the run and its directory (default: made of model, axes and batch)"),
    "comment": _text("end of the run's name"),
    "dry_run": _text(
        "1: print everything and start nothing; 2: also build each stage without memory", "0", "0", "1", "2"
    ),
    # what is watched
    "wandb_project": _text("project in Weights & Biases; used where WANDB_API_KEY is set", "fairseq-moe"),
    "wandb_mode": _text(
        "online, offline or disabled (default: online with a key)", None, "online", "offline", "disabled"
    ),
    "profile": _text("0, 1 (nsys if it is found, else torch), nsys or torch", "0", "0", "1", "nsys", "torch"),
    "profile_steps": _numbers("first and last update that is profiled", 10, 11),
    "profile_ranks": _numbers("ranks that are profiled", 0),
    # the cluster
    "device": _text("kind of GPU that the plan is for (on CPUs: cpu)", "h100"),
    "account": _text("of SLURM"),
    "partition": _text("of SLURM"),
    "gpus_per_node": _number("0: train on CPUs", 8, least=0),
    "cpus_per_task": _number("CPU cores of a rank"),
    "segment": _number("nodes that must lie together: SLURM's --segment"),
    "srun_args": _words("further arguments of srun"),
    "sbatch_args": _words("further arguments of sbatch"),
    "setup": _words("lines of the job script before the command"),
    "container": _text("none, pyxis, apptainer or docker", "none", "none", "pyxis", "apptainer", "docker"),
    "container_image": _path("path or name of the image"),
    "container_name": _text("of a container that pyxis keeps"),
    "container_mounts": _paths("OUTSIDE:INSIDE, or a path that is the same inside"),
    "container_workdir": _path("where the command starts, inside"),
    "user_dir": _path("--user-dir (default: this package; in a container the installed one)"),
    "secrets": _words("variables that ranks inherit and nothing writes down", "WANDB_API_KEY"),
}

# Keys of these are names of the user's: flags without their dashes, variables, data sets.
MAPS: dict[str, str] = {
    "flags": "flags of fairseq-train by name; true: the bare flag, false: not there",
    "env": "variables of every rank",
    "datasets": "directories of preprocessed text, by name",
}
_PATH_MAPS = ("env", "datasets")
# Keys of ModelZoo's own YAML files.
_THEIRS = {"ENV_VARS": "env", "MODEL_ARGS": "flags"}

_ON, _OFF = ("1", "true", "yes"), ("0", "false", "no")
_MAX_DIGITS = 18  # all numbers of so many fit 64 bits
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


def key_problem(key: str, *, aliases: Mapping[str, str] | None = None) -> str | None:
    """Say in one sentence why there is no such key, with the nearest one; None if there is.

    Args:
        key: as written, ``map.name`` for an entry of a map.
        aliases: other names of keys, for a suggestion.
    """
    first, dot, rest = key.partition(".")
    if key in SETTINGS or (first in MAPS and dot and rest):
        return None
    if first in MAPS:
        return f"{key!r} is a map; write {first}.NAME=value, or a map of names in YAML."
    if first in _THEIRS:
        return f"{first} is of ModelZoo's files; write {_THEIRS[first]}, with names as docs/from-megatron.md has them."
    known = {
        **{name: name for name in (*SETTINGS, *MAPS)},
        **{a.lower(): key for a, key in (aliases or {}).items()},
    }
    near = difflib.get_close_matches(key.lower(), known, n=1, cutoff=0.5)
    return f"there is no key {key!r}" + (
        f"; did you mean {known[near[0]]}?" if near else "; --list shows all."
    )


def read_value(key: str, given: Any, environ: Mapping[str, str]) -> Any:
    """Read the value of a key from a word or from what YAML made of it.

    Args:
        key: one that ``key_problem`` accepts.
        given: as written.
        environ: what ``${VARIABLE}`` is looked up in, where that is known: in paths, ``env`` and ``datasets``.

    Raises:
        ValueError: one sentence.
    """
    first, dot, _ = key.partition(".")
    if dot:
        return _filled(key, given, environ) if first in _PATH_MAPS else _flag_value(key, given)
    setting = SETTINGS[key]
    if setting.choices and isinstance(given, bool):
        raise ValueError(
            f"{key} is {str(given).lower()} (YAML reads on, off, yes and no so, too), expected one of "
            f"{', '.join(setting.choices)}."
        )
    value = _READERS[setting.kind](key, given, environ)
    if setting.choices and value not in setting.choices:
        raise ValueError(f"{key} is {given!r}, expected one of {', '.join(setting.choices)}.")
    if setting.kind == "number" and value < setting.least:
        raise ValueError(f"{key} is {value}, expected at least {setting.least}.")
    return value


def _plain(key: str, given: Any) -> str:
    if isinstance(given, bool) or not isinstance(given, str | int | float):
        raise ValueError(f"{key} is {given!r}, expected one word of text.")
    text = str(given)
    if "${" in text:
        raise ValueError(f"{key} is {text!r}, but ${{VARIABLE}} is filled in only in paths and in env.")
    return text


def _read_text(key: str, given: Any, environ: Mapping[str, str]) -> str:
    if key == "run_time" and not isinstance(given, str):  # YAML reads 1:20:00 as a number to the base 60
        raise ValueError(f"{key} is the number {given}; put the time in quotes, as '01:20:00'.")
    return _plain(key, given)


def _filled(key: str, given: Any, environ: Mapping[str, str]) -> str:
    if isinstance(given, bool) or not isinstance(given, str | int | float):
        raise ValueError(f"{key} is {given!r}, expected text.")
    text = str(given)
    if "$(" in text or "`" in text or "${" in _VARIABLE.sub("", text):
        raise ValueError(f"{key} is {text!r}, but no shell is run; only ${{VARIABLE}} is filled in.")
    if text.startswith("~") and not key.startswith("env."):
        raise ValueError(f"{key} is {text!r}, but no shell is run; write ${{HOME}} in place of ~.")
    missing = [name for name in _VARIABLE.findall(text) if name not in environ]
    if missing:
        raise ValueError(f"{key} is {text!r}, and the environment has no {', '.join(missing)}; set it.")
    return _VARIABLE.sub(lambda found: environ[found[1]], text)


def _read_number(key: str, given: Any, environ: Mapping[str, str]) -> int:
    if isinstance(given, bool) or not re.fullmatch(r"[+-]?\d+", str(given).strip()):
        raise ValueError(f"{key} is {given!r}, expected a whole number.")
    if len(str(given)) > _MAX_DIGITS:
        raise ValueError(f"{key} is a number of {len(str(given))} digits, expected at most {_MAX_DIGITS}.")
    return int(given)


def _read_switch(key: str, given: Any, environ: Mapping[str, str]) -> bool:
    word = str(given).strip().lower()
    if word not in (*_ON, *_OFF):
        raise ValueError(f"{key} is {given!r}, expected true or false.")
    return word in _ON


def _read_words(key: str, given: Any, environ: Mapping[str, str]) -> tuple[str, ...]:
    """Split text at spaces and commas, but lines and flags at spaces alone, with quotes as a shell reads them."""
    if isinstance(given, list | tuple):
        return tuple(_plain(key, word) for word in given)
    if key == "setup":
        return tuple(str(given).splitlines())
    text = _plain(key, given)
    if key in ("training_params", "srun_args", "sbatch_args"):
        return tuple(_split(key, text))
    return tuple(text.replace(",", " ").split())


def _read_numbers(key: str, given: Any, environ: Mapping[str, str]) -> tuple[int, ...]:
    found = _read_words(key, [given] if isinstance(given, int) else given, environ)
    if not found or not all(word.isdecimal() for word in found):
        raise ValueError(f"{key} is {given!r}, expected whole numbers, as in 1,2.")
    return tuple(int(word) for word in found)


def _split(key: str, text: str) -> Iterable[str]:
    import shlex

    try:
        return shlex.split(text)
    except ValueError as error:
        raise ValueError(f"{key} is {text!r}, of which a quote is not closed ({error}).") from error


def _read_paths(key: str, given: Any, environ: Mapping[str, str]) -> tuple[str, ...]:
    parts = given if isinstance(given, list | tuple) else str(given).split(",")
    return tuple(_filled(key, part, environ).strip() for part in parts if str(part).strip())


def _flag_value(key: str, given: Any) -> bool | str | tuple[str, ...]:
    if isinstance(given, list | tuple):
        return tuple(_plain(key, word) for word in given)
    if isinstance(given, bool) or str(given) in ("true", "false"):
        return given is True or given == "true"
    return _plain(key, given)


_READERS: dict[Kind, Callable[[str, Any, Mapping[str, str]], Any]] = {
    "number": _read_number,
    "numbers": _read_numbers,
    "text": _read_text,
    "path": _filled,
    "switch": _read_switch,
    "words": _read_words,
    "paths": _read_paths,
}
