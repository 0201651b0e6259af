"""Every recipe parses with fairseq-train's flags, passes all checks, and is what ModelZoo and the guides state."""

from typing import Any

import pytest

from tests.helpers.ranks import run_ranks

# Of ModelZoo's table and of the guides: TP PP EP CP VPP, MBS GBS, nodes, minutes, first and last stage.
ROWS = {
    "mixtral_8x2b": (1, 1, 8, 1, 1, 2, 256, 8, 20, None, None),
    "mixtral_8x7b": (1, 4, 8, 1, 8, 1, 256, 8, 20, None, None),
    "mixtral_8x22b": (2, 8, 8, 1, 1, 1, 256, 16, 20, None, None),
    "mixtral_8x22b_vpp7": (2, 8, 8, 1, 7, 1, 256, 16, 20, None, None),
    "deepseek_v2": (1, 16, 8, 1, 2, 1, 1024, 32, 20, 2, 2),
    "deepseek_v2_lite": (1, 1, 8, 1, 1, 1, 512, 1, 20, None, None),
    "deepseek_v3": (1, 16, 64, 1, 1, 1, 8192, 128, 40, 4, 1),
    "qwen2_57b_a14b": (2, 4, 4, 1, 7, 1, 256, 8, 20, None, None),
    # Of no table: mappings of ours.
    "glm_4_5": (1, 4, 32, 1, 1, 1, 1024, 32, 20, None, None),
    "glm_4_5_air": (1, 2, 16, 1, 1, 1, 1024, 8, 20, None, None),
    "glm_4_7_flash": (1, 1, 8, 1, 1, 1, 512, 4, 20, None, None),
    "dots_llm1": (1, 2, 32, 1, 1, 1, 1024, 16, 20, None, None),
    "minimax_m2": (1, 2, 32, 1, 1, 1, 1024, 16, 20, None, None),
    "kimi_k2": (1, 16, 64, 1, 1, 1, 8192, 128, 20, 4, 1),
    "gpt_oss_20b": (1, 1, 8, 1, 1, 1, 512, 2, 20, None, None),
    "gpt_oss_120b": (1, 2, 16, 1, 1, 1, 1024, 8, 20, None, None),
    "granite_1b_a400m": (1, 1, 8, 1, 1, 1, 512, 1, 20, None, None),
    "granite_3b_a800m": (1, 1, 8, 1, 1, 1, 512, 1, 20, None, None),
    "hunyuan_a13b": (1, 2, 16, 1, 1, 1, 1024, 8, 20, None, None),
    "ernie_45_21b_a3b": (1, 1, 8, 1, 1, 1, 512, 2, 20, None, None),
    "ernie_45_300b_a47b": (1, 6, 32, 1, 1, 1, 1536, 24, 20, None, None),
    "megatron_8x7b_64gpu": (1, 4, 8, 1, 8, 1, 256, 8, 20, None, None),
    "megatron_8x22b_128gpu": (4, 8, 2, 1, 7, 1, 256, 16, 20, None, None),
}
# Micro-batches of an update: GBS / (MBS DP).
UPDATE_FREQ = {
    "mixtral_8x2b": 2,
    "mixtral_8x7b": 16,
    "mixtral_8x22b": 32,
    "mixtral_8x22b_vpp7": 32,
    "deepseek_v2": 64,
    "deepseek_v2_lite": 64,
    "deepseek_v3": 128,
    "qwen2_57b_a14b": 32,
    "glm_4_5": 16,
    "glm_4_5_air": 32,
    "glm_4_7_flash": 16,
    "dots_llm1": 16,
    "minimax_m2": 16,
    "kimi_k2": 128,
    "gpt_oss_20b": 32,
    "gpt_oss_120b": 32,
    "granite_1b_a400m": 64,
    "granite_3b_a800m": 64,
    "hunyuan_a13b": 32,
    "ernie_45_21b_a3b": 32,
    "ernie_45_300b_a47b": 48,
    "megatron_8x7b_64gpu": 16,
    "megatron_8x22b_128gpu": 64,
    "branch_single_node": 1,
    "branch_multi_node": 1,
    "laptop": 1,
    "shrunk_8x7b": 4,
    "shrunk_8x22b": 4,
}


def resolved(rank: int) -> dict[str, Any]:
    """Of each recipe: its ranks, its configuration and its notes."""
    import fairseq_moe  # noqa: F401
    from fairseq_moe.launch.files import names
    from fairseq_moe.launch.resolve import resolve_all
    from fairseq_moe.planner.parsing import configured, parsed

    found = {}
    for name in names("recipe"):
        resolution = resolve_all([name], {})
        cfg = configured(parsed(resolution.job.command[1:]))
        found[name] = {
            "ranks": resolution.job.num_ranks,
            "update_freq": list(cfg.optimization.update_freq),
            "batch_size": cfg.dataset.batch_size,
            "notes": resolution.notes,
            "length": cfg.task.tokens_per_sample,
        }
    return found


@pytest.fixture(scope="module")
def recipes() -> dict[str, Any]:
    found: dict[str, Any] = run_ranks(resolved, 1, timeout=300.0)[0]
    return found


@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", UPDATE_FREQ)
def test_a_recipe_passes_all_checks(name: str, recipes: dict[str, Any]) -> None:
    found = recipes[name]
    assert found["update_freq"] == [UPDATE_FREQ[name]]
    for note in found["notes"]:
        assert "flex" in note or "nothing balances" in note


def test_every_recipe_is_listed(recipes: dict[str, Any]) -> None:
    assert recipes.keys() == UPDATE_FREQ.keys()
    assert ROWS.keys() == {name for name, found in recipes.items() if found["length"] == 4096}


@pytest.mark.parametrize("name", ROWS)
def test_a_recipe_is_the_published_row(name: str) -> None:
    from fairseq_moe.launch.layers import collect

    layered = collect([name], {})
    keys = ("tp", "pp", "ep", "cp", "vpp", "mbs", "gbs", "nodes", "run_time", "pp_first", "pp_last")
    row = list(ROWS[name])
    row[8] = f"00:{row[8]}:00"
    assert [layered[key] for key in keys] == row


# Command line, environment, and parts of what is said: of problems, or of notes.
SAID: dict[str, tuple[list[str], dict[str, str], str, list[str]]] = {
    "settings and flags together": (
        ["laptop", "ep=3", "gbs=7", "--", "--decoder-kv-heads", "3"],
        {"WANDB_API_KEY": "k", "COMMENT": "k"},
        "problems",
        ["gbs is 7", "the value of WANDB_API_KEY", "--expert-model-parallel-size", "kv-heads"],
    ),
    "fairseq's parser": (
        ["laptop", "--", "--no-such-flag", "1"],
        {},
        "problems",
        ["fairseq-train would say: unrecognized arguments: --no-such-flag 1."],
    ),
    "layers over stages": (["mixtral_8x7b", "vpp=5"], {}, "problems", ["pipeline"]),
    "heads over tensor ranks": (["mixtral_8x7b", "tp=16"], {}, "problems", ["--decoder-kv-heads 8"]),
    "a cosine without a period": (
        ["laptop", "--", "--max-update", "20"],
        {},
        "problems",
        ["--max-update is 20, --warmup-updates 20"],
    ),
    "FP8 on GPUs that are not here": (["mixtral_8x7b"], {"PR": "fp8"}, "problems", []),
    "FP8 of widths that it does not take": (
        ["mixtral_8x7b", "flags.moe_ffn_hidden_size=100"],
        {"PR": "fp8"},
        "problems",
        ["--moe-fp8 native cannot be honoured"],
    ),
    "micro-batches that do not fill stages": (
        ["mixtral_8x7b", "gbs=272"],
        {},
        "notes",
        ["--update-freq 17 is no multiple of --pipeline-model-parallel-size 4"],
    ),
    "dispatchers as raw flags": (
        ["laptop", "--", "--moe-token-dispatcher-type", "flex", "--moe-enable-deepep"],
        {},
        "notes",
        ["--moe-token-dispatcher-type flex stands for alltoall here", "--moe-enable-deepep is accepted"],
    ),
}


def said(rank: int) -> dict[str, dict[str, list[str]]]:
    """The problems, or the notes, of each command line."""
    from fairseq_moe.errors import ConfigError
    from fairseq_moe.launch.resolve import resolve_all

    found: dict[str, dict[str, list[str]]] = {}
    for name, (arguments, environ, *_) in SAID.items():
        try:
            found[name] = {"problems": [], "notes": list(resolve_all(arguments, environ).notes)}
        except ConfigError as error:
            found[name] = {"problems": error.problems, "notes": []}
    return found


@pytest.fixture(scope="module")
def answers() -> dict[str, dict[str, list[str]]]:
    found: dict[str, dict[str, list[str]]] = run_ranks(said, 1, timeout=200.0)[0]
    return found


@pytest.mark.timeout(250)
@pytest.mark.parametrize("name", SAID)
def test_what_is_said_of_a_command(name: str, answers: dict[str, dict[str, list[str]]]) -> None:
    *_, kind, parts = SAID[name]
    found = answers[name]
    other = "notes" if kind == "problems" else "problems"
    if parts:
        assert found[other] == []
    assert len(found[kind]) >= len(parts) if parts else found[kind] == []
    for part in parts:
        assert any(part in sentence for sentence in found[kind]), found[kind]
