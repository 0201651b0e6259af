"""Each of ModelZoo's variables sets a key, is read by the job script, or is ignored or refused with a sentence."""

from pathlib import Path

import pytest

from fairseq_moe.errors import ConfigError
from fairseq_moe.launch.layers import collect
from fairseq_moe.launch.settings import SETTINGS
from fairseq_moe.launch.variables import VARIABLES

# A value of each variable, and what follows: a key with its value, or "ignored", "kept", "refused".
ROWS: dict[str, tuple[str, object]] = {
    "MODEL": ("DeepSeek-V3", ("recipe", "DeepSeek-V3")),
    "CLUSTER": ("none", ("cluster", "none")),
    "MCORE_RELEASE_VERSION": ("0.13", "ignored"),
    "MEGATRON_PATH": ("/m", "ignored"),
    "CONTAINER_IMAGE": ("a.sqsh", ("container_image", "a.sqsh")),
    "TRAINING_SCRIPT_PATH": ("pretrain_gpt.py", "ignored"),
    "TRAINING_PARAMS_PATH": ("RUN_FILE", ("mbs", 77)),
    "TRAINING_PARAMS": ("--seed '1 2'", ("training_params", ("--seed", "1 2"))),
    "OUTPUT_PATH": ("/o", ("output_path", "/o")),
    "DATA_PATH": ("/d", ("data_path", "/d")),
    "DATASET": ("wiki", ("dataset", "wiki")),
    "TOKENIZER_MODEL": ("/t.json", ("tokenizer_model", "/t.json")),
    "LOAD_PATH": ("/l.pt", ("load_path", "/l.pt")),
    "TP": ("2", ("tp", 2)),
    "PP": ("3", ("pp", 3)),
    "EP": ("4", ("ep", 4)),
    "ETP": ("5", ("etp", 5)),
    "CP": ("6", ("cp", 6)),
    "VPP": ("7", ("vpp", 7)),
    "PP_FIRST": ("8", ("pp_first", 8)),
    "PP_LAST": ("9", ("pp_last", 9)),
    "LAYERS_PER_VP": ("10", ("layers_per_vp", 10)),
    "MBS": ("11", ("mbs", 11)),
    "GBS": ("12", ("gbs", 12)),
    "NUM_LAYERS": ("13", ("num_layers", 13)),
    "SEQ_LEN": ("14", ("seq_len", 14)),
    "NNODES": ("15", ("nodes", 15)),
    "RUN_TIME": ("00:20:00", ("run_time", "00:20:00")),
    "PRETRAIN": ("0", ("pretrain", False)),
    "RUN_NAME": ("r", ("run_name", "r")),
    "COMMENT": ("c", ("comment", "c")),
    "REQUEUE": ("1", ("requeue", True)),
    "SUBMIT_CHAIN": ("3", ("chain", 3)),
    "DRY_RUN": ("1", ("dry_run", "1")),
    "MOE_TOKEN_DISPATCHER": ("allgather", ("dispatcher", "allgather")),
    "DISPATCHER": ("deepep", ("dispatcher", "deepep")),
    "MOE_GROUPED_GEMM": ("true", ("grouped_gemm", True)),
    "PR": ("fp8", ("precision", "fp8")),
    "OPTIMIZER_OFFLOAD": ("1", "refused"),
    "A2A_OVERLAP": ("1", "refused"),
    "WANDB_API_KEY": ("k", "kept"),
    "WANDB_PROJECT": ("p", ("wandb_project", "p")),
    "WANDB_MODE": ("offline", ("wandb_mode", "offline")),
    "PROFILE": ("torch", ("profile", "torch")),
    "PROFILE_STEPS": ("23 25", ("profile_steps", (23, 25))),
    "PROFILE_RANKS": ("0,1", ("profile_ranks", (0, 1))),
    "ACCOUNT": ("a", ("account", "a")),
    "PARTITION": ("p", ("partition", "p")),
    "SEGMENT": ("16", ("segment", 16)),
    "CONTAINER_NAME": ("n", ("container_name", "n")),
    "CONTAINER_MOUNTS": ("/a:/b,/c", ("container_mounts", ("/a:/b", "/c"))),
    "GPUS_PER_NODE": ("4", ("gpus_per_node", 4)),
    "NGPU": ("2", ("ranks_per_node", 2)),
    "TRITON_CACHE_DIR": ("/tmp/t", ("env.TRITON_CACHE_DIR", "/tmp/t")),
    "MASTER_ADDR": ("m", "kept"),
    "MASTER_PORT": ("1", "kept"),
    "NODE_RANK": ("0", "kept"),
    "GB200_CLUSTER": ("1", "refused"),
    "BINDPCIE_PATH": ("/b", "refused"),
    "SOURCE_CKPT_PATH": ("/s", "ignored"),
    "TARGET_CKPT_PATH": ("/t", "ignored"),
}


def test_every_variable_has_a_row() -> None:
    assert ROWS.keys() == VARIABLES.keys()


@pytest.mark.parametrize("name", ROWS)
def test_a_variable_does_what_its_row_says(name: str, tmp_path: Path) -> None:
    value, expected = ROWS[name]
    if value == "RUN_FILE":
        value = f"{tmp_path}/run.yaml"
        Path(value).write_text("mbs: 77\n")
    if expected == "refused":
        with pytest.raises(ConfigError, match=f"^{name}={value} cannot be honoured: "):
            collect([], {name: value})
        assert collect([], {name: "0"}).values == collect([], {}).values
        return
    layered, plain = collect([], {name: value}), collect([], {})
    if isinstance(expected, tuple):
        key, read = expected
        assert layered[key] == read
        assert layered[key] != plain.values.get(key)
        assert layered.notes == ()
        return
    assert layered.values == plain.values
    assert [note.split(":")[0] for note in layered.notes] == (
        [f"{name} is ignored"] if expected == "ignored" else []
    )


def test_an_empty_variable_is_not_there() -> None:
    environ = dict.fromkeys(VARIABLES, "")
    assert collect([], environ) == collect([], {})


def test_modelzoos_false_asks_for_nothing() -> None:
    environ = dict.fromkeys(("PP_FIRST", "PP_LAST", "LAYERS_PER_VP"), "false")
    assert collect([], environ) == collect([], {})


def test_every_key_of_a_variable_is_one() -> None:
    keys = {row.text for row in VARIABLES.values() if row.does == "sets"}
    assert keys - SETTINGS.keys() == {"env.TRITON_CACHE_DIR"}


def test_mxfp8_is_refused() -> None:
    with pytest.raises(ConfigError, match="PR=mxfp8 cannot be honoured: there is no MXFP8 here"):
        collect([], {"PR": "mxfp8"})


def test_two_variables_of_one_key_must_agree() -> None:
    # ModelZoo's own scripts set both for DeepEP.
    layered = collect([], {"MOE_TOKEN_DISPATCHER": "flex", "DISPATCHER": "deepep"})
    assert layered["dispatcher"] == "deepep"
    with pytest.raises(
        ConfigError, match="MOE_TOKEN_DISPATCHER=allgather and DISPATCHER=deepep both set dispatcher"
    ):
        collect([], {"MOE_TOKEN_DISPATCHER": "allgather", "DISPATCHER": "deepep"})
