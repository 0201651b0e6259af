"""Say what each of ModelZoo's variables means here: the key that it sets, or why it sets none.

A variable that is empty is as if it were not there, as in ModelZoo's own scripts.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

__all__ = ["ALLTOALL", "VARIABLES", "Read", "Variable", "aliases", "values_of", "variables_table"]

# Dispatchers that are alltoall here: they name kernels of vendors for the same exchange.
ALLTOALL = ("alltoall_seq", "flex", "deepep", "hybridep")


@dataclass(frozen=True, kw_only=True)
class Variable:
    """Describe one variable of ModelZoo.

    Args:
        does: ``sets`` a key; ``kept``: the job script reads it where it runs; ``ignored``; ``refused``.
        text: the key, or one sentence's reason.
        values: of those that it takes otherwise, the ones that are refused, with the reason.
        harmless: values that ask for nothing.
    """

    does: Literal["sets", "kept", "ignored", "refused"]
    text: str
    values: Mapping[str, str] = field(default_factory=dict)
    harmless: tuple[str, ...] = ()


def _sets(key: str, *harmless: str, **values: str) -> Variable:
    return Variable(does="sets", text=key, values=values, harmless=harmless)


def _kept(reason: str) -> Variable:
    return Variable(does="kept", text=reason)


def _ignored(reason: str) -> Variable:
    return Variable(does="ignored", text=reason)


def _refused(reason: str, *harmless: str) -> Variable:
    return Variable(does="refused", text=reason, harmless=harmless)


_NODE = "the job script reads it on each machine (interactive mode)"

VARIABLES: dict[str, Variable] = {
    # required by ModelZoo
    "MODEL": _sets("recipe"),
    "CLUSTER": _sets("cluster"),
    "MCORE_RELEASE_VERSION": _ignored("it only names runs of a Megatron release; use COMMENT for the name"),
    "MEGATRON_PATH": _ignored("there is no Megatron checkout here; this package trains"),
    "CONTAINER_IMAGE": _sets("container_image"),
    # paths
    "TRAINING_SCRIPT_PATH": _ignored("the training program is always fairseq-train"),
    "TRAINING_PARAMS_PATH": _sets("run"),
    "TRAINING_PARAMS": _sets("training_params"),
    "OUTPUT_PATH": _sets("output_path"),
    "DATA_PATH": _sets("data_path"),
    "DATASET": _sets("dataset"),
    "TOKENIZER_MODEL": _sets("tokenizer_model"),
    "LOAD_PATH": _sets("load_path"),
    # axes
    "TP": _sets("tp"),
    "PP": _sets("pp"),
    "EP": _sets("ep"),
    "ETP": _sets("etp"),
    "CP": _sets("cp"),
    "VPP": _sets("vpp"),
    "PP_FIRST": _sets("pp_first", "false"),
    "PP_LAST": _sets("pp_last", "false"),
    "LAYERS_PER_VP": _sets("layers_per_vp", "false"),
    # run
    "MBS": _sets("mbs"),
    "GBS": _sets("gbs"),
    "NUM_LAYERS": _sets("num_layers"),
    "SEQ_LEN": _sets("seq_len"),
    "NNODES": _sets("nodes"),
    "RUN_TIME": _sets("run_time"),
    "PRETRAIN": _sets("pretrain"),
    "RUN_NAME": _sets("run_name"),
    "COMMENT": _sets("comment"),
    "REQUEUE": _sets("requeue"),
    "SUBMIT_CHAIN": _sets("chain"),
    "DRY_RUN": _sets("dry_run"),
    # experts, precision, memory
    "MOE_TOKEN_DISPATCHER": _sets("dispatcher"),
    "DISPATCHER": _sets("dispatcher"),
    "MOE_GROUPED_GEMM": _sets("grouped_gemm"),
    "PR": _sets("precision", mxfp8="there is no MXFP8 here; use fp8, which scales rows, or bf16"),
    "OPTIMIZER_OFFLOAD": _refused(
        "optimizer states stay on the GPU; flags.use-torch-fsdp2=true shards them", "0"
    ),
    "A2A_OVERLAP": _refused("the exchange is not overlapped with another micro-batch; leave it out", "0"),
    # what is watched
    "WANDB_API_KEY": _kept("ranks inherit it, and it is written nowhere"),
    "WANDB_PROJECT": _sets("wandb_project"),
    "WANDB_MODE": _sets("wandb_mode"),
    "PROFILE": _sets("profile"),
    "PROFILE_STEPS": _sets("profile_steps"),
    "PROFILE_RANKS": _sets("profile_ranks"),
    # SLURM and machines
    "ACCOUNT": _sets("account"),
    "PARTITION": _sets("partition"),
    "SEGMENT": _sets("segment"),
    "CONTAINER_NAME": _sets("container_name"),
    "CONTAINER_MOUNTS": _sets("container_mounts"),
    "GPUS_PER_NODE": _sets("gpus_per_node"),
    "NGPU": _sets("ranks_per_node"),
    "TRITON_CACHE_DIR": _sets("env.TRITON_CACHE_DIR"),
    "MASTER_ADDR": _kept(_NODE),
    "MASTER_PORT": _kept(_NODE),
    "NODE_RANK": _kept(_NODE),
    "GB200_CLUSTER": _refused("set GPUS_PER_NODE=4, and SEGMENT, in its place", "0"),
    "BINDPCIE_PATH": _refused("processes are bound by srun: srun_args=--cpu-bind=cores", "0"),
    # of ModelZoo's converters
    "SOURCE_CKPT_PATH": _ignored("fairseq-moe-convert takes the path of a checkpoint as an argument"),
    "TARGET_CKPT_PATH": _ignored("fairseq-moe-convert takes the path of what it writes as an argument"),
}


@dataclass(frozen=True, kw_only=True)
class Read:
    """Hold what the environment says.

    Args:
        values: by key.
        sources: the variable that each comes from.
        problems: sentences about variables that are refused.
        notes: sentences about variables that do nothing.
    """

    values: dict[str, str]
    sources: dict[str, str]
    problems: list[str]
    notes: list[str]


def aliases() -> dict[str, str]:
    """Map the variables that set a key to it."""
    return {name: row.text for name, row in VARIABLES.items() if row.does == "sets"}


def values_of(environ: Mapping[str, str]) -> Read:
    """Read ModelZoo's variables as keys.

    Args:
        environ: the environment, of which nothing but the variables of the table is looked at.
    """
    read = Read(values={}, sources={}, problems=[], notes=[])
    for name, row in VARIABLES.items():
        value = environ.get(name, "")
        if not value or value in row.harmless:
            continue
        if row.does == "ignored":
            read.notes.append(f"{name} is ignored: {row.text}.")
        elif row.does == "refused":
            read.problems.append(f"{name}={value} cannot be honoured: {row.text}.")
        elif value in row.values:
            read.problems.append(f"{name}={value} cannot be honoured: {row.values[value]}.")
        elif row.does == "sets":
            _set(read, name, row.text, value)
    return read


def _set(read: Read, name: str, key: str, value: str) -> None:
    other = read.values.get(key)
    if other is not None and _meaning(key, other) != _meaning(key, value):
        read.problems.append(
            f"{read.sources[key]}={other} and {name}={value} both set {key}; leave one of the two out."
        )
    read.values[key], read.sources[key] = value, name


def _meaning(key: str, value: str) -> str:
    """Take dispatchers that are the same here as one."""
    return "alltoall" if key == "dispatcher" and value in ALLTOALL else value


def variables_table() -> str:
    """Write the table of docs/from-megatron.md."""
    lines = ["| variable | here |", "| --- | --- |"]
    for name, row in VARIABLES.items():
        text = f"`{row.text}`" if row.does == "sets" else f"{row.does}: {row.text}"
        more = "".join(f"; `{value}` is refused: {reason}" for value, reason in row.values.items())
        lines.append(f"| `{name}` | {text}{more} |")
    return "\n".join(lines)
