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
    from fairseq_moe.launch.flag_checks import _parsed
    from fairseq_moe.launch.resolve import resolve_all

    found = {}
    for name in names("recipe"):
        resolution = resolve_all([name], {})
        cfg = _parsed(resolution.job.command[1:])
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


def checked(rank: int, arguments: list[str], environ: dict[str, str]) -> list[str]:
    """The problems that a command line gets."""
    from fairseq_moe.errors import ConfigError
    from fairseq_moe.launch.resolve import resolve

    try:
        resolve(arguments, environ)
    except ConfigError as error:
        return error.problems
    return []


@pytest.mark.timeout(200)
def test_settings_and_flags_are_told_together() -> None:
    words = ["laptop", "ep=3", "gbs=7", "--", "--decoder-kv-heads", "3"]
    found = run_ranks(checked, 1, words, {"WANDB_API_KEY": "k", "COMMENT": "k"}, timeout=100.0)[0]
    assert len(found) >= 4
    text = " ".join(found)
    for part in ("gbs is 7", "the value of WANDB_API_KEY", "--expert-model-parallel-size", "kv-heads"):
        assert part in text


@pytest.mark.timeout(200)
def test_what_fairseqs_parser_says_is_one_sentence() -> None:
    words = ["laptop", "--", "--no-such-flag", "1"]
    found = run_ranks(checked, 1, words, {}, timeout=100.0)[0]
    assert found == ["fairseq-train would say: unrecognized arguments: --no-such-flag 1."]
