"""What the planner says of published mappings, as Megatron counts them: bytes, bubbles, operations and times.

Bytes of states are what ``compute_weight_and_optimizer_memory`` of Megatron-LM (2026-08) gave, run on its source in
bfloat16 with the distributed optimizer. Activations of DeepSeek-V3: the Megatron-Core report, arXiv 2603.07685, Table
3. Rates: NVIDIA's published pairs of TFLOPS and tokens per second. Run with
``pytest tests/unit/planner/test_reference_numbers.py``.
"""

from fractions import Fraction
from typing import Any

import pytest

from fairseq_moe.parallel.schedule import bubble_frac
from fairseq_moe.parallel.traffic import shared_bytes
from fairseq_moe.planner.flops import flops_per_token
from fairseq_moe.planner.held import held_by
from fairseq_moe.planner.megatron import layer_activations, layers_in_flight, megatron_states
from fairseq_moe.planner.parameters import stage_parts
from fairseq_moe.planner.time import idle_frac, seconds_of
from tests.helpers.published_mappings import LENGTH, mapping, shape

_MIB, _GIB = 1 << 20, 1 << 30


# number, model, words, mapping, bytes, GiB, 1e9 parameters of the most loaded and of another stage
STATES: tuple[tuple[int, str, dict[str, Any], dict[str, Any], int, float, tuple[float, ...]], ...] = (
    (1, "mixtral_8x7b", {}, {"ranks": 64, "expert": 8, "pipe": 4}, 20_063_312_640, 18.685, (1.8762, 1.7452)),
    (2, "mixtral_8x7b", {}, {"ranks": 32, "expert": 8, "pipe": 4}, 28_869_238_272, 26.887, (1.8762, 1.7452)),
    (3, "mixtral_8x22b", {"num_words": 32_000}, {"ranks": 128, "tensor": 4, "expert": 2, "pipe": 8, "parts": 4},
     27_200_662_272, 25.333, (2.3177, 2.2685)),
    (4, "mixtral_8x22b", {"num_words": 32_000}, {"ranks": 128, "tensor": 2, "expert": 8, "pipe": 8},
     28_419_772_032, 26.468, (2.5209, 2.4226)),
    (5, "deepseek_v3", {}, {"ranks": 1024, "expert": 64, "pipe": 16}, 23_131_298_196, 21.543, (2.5193, 1.5926)),
    (6, "deepseek_v3", {"mtp_layers": 1}, {"ranks": 1024, "tensor": 2, "expert": 64, "pipe": 8},
     26_977_865_904, 25.125, (2.9948, 2.2379)),
    (7, "deepseek_v3", {}, {"ranks": 256, "expert": 64, "pipe": 4}, 75_323_713_104, 70.151, (7.2971, 6.3704)),
    (8, "qwen3_30b_a3b", {}, {"ranks": 8, "expert": 8}, 76_787_923_968, 71.514, (5.1650,)),
    (9, "qwen3_235b_a22b", {}, {"ranks": 256, "tensor": 2, "expert": 32, "pipe": 8},
     20_937_930_624, 19.500, (1.6234, 1.3123)),
    (10, "deepseek_v2_lite", {}, {"ranks": 8, "expert": 8}, 42_225_662_208, 39.326, (3.1110,)),
)  # fmt: skip


@pytest.mark.parametrize("row", STATES, ids=lambda row: str(row[0]))
def test_states_as_megatron_counts_them(row: Any) -> None:
    _, name, words, axes, total, gib, parameters = row
    found = megatron_states(shape(name, **words), mapping(**axes))
    assert found.total_bytes == total
    assert float(found.total_bytes / _GIB) == pytest.approx(gib, abs=5e-4)
    numbers = (float(found.parameters / 10**9), float(found.other_stage / 10**9))
    assert numbers[: len(parameters)] == pytest.approx(parameters, abs=5.1e-5)


def test_mixtral_by_hand() -> None:
    attention, words, norms, experts = 8 * 41_943_040, 131_072_000, 328_704, 1_409_286_144
    found = megatron_states(shape("mixtral_8x7b"), mapping(64, expert=8, pipe=4))
    assert (found.dense, found.expert) == (attention + words + norms, experts)
    assert found.total_bytes == (attention + words + norms) * Fraction(27, 4) + experts * 12


def test_deepseek_on_256_ranks_as_the_report_has_it() -> None:
    # 16 layers on each stage, the last one with a share of what is around them: 61 layers and a block more.
    model, spread = (
        shape("deepseek_v3", mtp_layers=1),
        mapping(256, expert=64, pipe=4, virtual=4, micro_batches=64),
    )
    layer = layer_activations(model, spread, is_moe=True, probabilities_after=True)
    assert float(layer.total) / _MIB == pytest.approx(2236, abs=0.5)
    assert layer.parts["permuted rows"] == layer.parts["fc2"] == 448 * _MIB
    shared = layer.parts["shared experts"]  # as wide before the activation, twice, as after it
    assert layer.parts["activation"] + shared / 3 == 144 * _MIB and layer.parts["norms"] == 112 * _MIB
    assert shared == 48 * _MIB and layer.input_bytes == 56 * _MIB
    assert float(60 * layer.total) / _GIB == pytest.approx(131.02, abs=0.03)
    assert layers_in_flight(64, spread) == 76
    assert float(76 * layer.total) / _GIB == pytest.approx(165.95, abs=0.04)


def test_a_layer_of_mixtral() -> None:
    model, spread = shape("mixtral_8x7b"), mapping(64, expert=8, pipe=4, virtual=8, micro_batches=16)
    layer = layer_activations(model, spread, is_moe=True)
    mib = {name: float(size) / _MIB for name, size in layer.parts.items() if size}
    assert mib == {
        "fc1": 448, "activation": 224, "permuted rows": 64, "residuals": 64, "queries, keys, values": 48, "norms": 64,
        "attention output": 32, "log-sum-exp": 0.5, "router": 0.125,
    }  # fmt: skip
    assert float(layer.total) / _MIB == pytest.approx(944.62, abs=0.006)
    assert float(layer.total - layer.parts["activation"]) / _MIB == pytest.approx(720.62, abs=0.006)
    assert layer.input_bytes == 32 * _MIB
    in_flight = layers_in_flight(32, spread)
    assert in_flight == 35 and float(in_flight * layer.total) / _GIB == pytest.approx(32.29, abs=0.005)


def test_a_layer_of_qwen3() -> None:
    layer = layer_activations(shape("qwen3_30b_a3b"), mapping(8, expert=8), is_moe=True)
    assert float(layer.total) / _MIB == pytest.approx(410.50, abs=0.006)


def test_a_layer_of_mixtral_8x22b_in_four_parts() -> None:
    spread = mapping(128, tensor=4, expert=2, pipe=8, virtual=7, parts=4, micro_batches=64)
    layer = layer_activations(shape("mixtral_8x22b"), spread, is_moe=True)
    assert float(layer.total) / _MIB == pytest.approx(364.22, abs=0.006)
    in_flight = layers_in_flight(56, spread)
    assert in_flight == 63 and float(in_flight * layer.total) / _GIB == pytest.approx(22.41, abs=0.005)


@pytest.mark.parametrize(("name", "expert", "mib"), [("mixtral_8x7b", 8, 56), ("deepseek_v3", 64, 441)])
def test_rows_sent_in_one_direction(name: str, expert: int, mib: int) -> None:
    model = shape(name)
    assert shared_bytes(LENGTH * model.top_k * model.dim * 2, expert) == mib * _MIB


@pytest.mark.parametrize(
    ("pipe", "virtual", "micro_batches", "of_ideal_percent"),
    [(4, 8, 16, "2.34375"), (8, 7, 64, "1.5625"), (8, 4, 128, "1.3671875"), (16, 1, 128, "11.71875")],
)
def test_bubbles(pipe: int, virtual: int, micro_batches: int, of_ideal_percent: str) -> None:
    share = bubble_frac(pipe, virtual, micro_batches)
    assert share / (1 - share) == Fraction(of_ideal_percent) / 100
    spread = mapping(pipe, pipe=pipe, virtual=virtual, micro_batches=micro_batches)
    assert idle_frac(spread) == pytest.approx(float(share))
    if pipe == 16:
        assert float(share) == pytest.approx(0.1049, abs=5e-5)


GFLOP = {
    "mixtral_8x7b": 79.706456, "mixtral_8x22b": 242.167579, "qwen3_30b_a3b": 23.006282, "qwen3_235b_a22b": 148.034814,
    "deepseek_v2_lite": 16.386097, "deepseek_v3": 249.811304,
}  # fmt: skip


@pytest.mark.parametrize("name", GFLOP)
def test_operations_of_a_token(name: str) -> None:
    words = 32_000 if name == "mixtral_8x22b" else None
    assert flops_per_token(shape(name, num_words=words), LENGTH) / 1e9 == pytest.approx(GFLOP[name], abs=5e-7)


def test_operations_with_a_block_that_guesses_further() -> None:
    trained = shape("deepseek_v3", mtp_layers=1, mtp_loss_weight=0.3)
    assert flops_per_token(trained, LENGTH) / 1e9 == pytest.approx(259.992060, abs=5e-7)
    kept = shape("deepseek_v3", mtp_layers=1)  # without a loss it is not computed
    assert flops_per_token(kept, LENGTH) / 1e9 == pytest.approx(249.811304, abs=5e-7)


@pytest.mark.parametrize(
    ("name", "more", "tflops", "tokens_per_sec"),
    [
        ("qwen3_235b_a22b", {}, 253, 1712),
        ("qwen3_235b_a22b", {}, 1306, 8816),
        ("qwen3_235b_a22b", {}, 276, 2048 * 4096 / 17.6 / 256),
        ("qwen3_30b_a3b", {}, 277, 12_040),
        ("deepseek_v3", {}, 250, 1002),
        ("deepseek_v3", {}, 216, 865),
        ("deepseek_v3", {}, 961, 3848),
        ("deepseek_v3", {"mtp_layers": 1, "mtp_loss_weight": 0.1}, 1635, 6288),
    ],
)
def test_published_rates_agree(name: str, more: dict[str, Any], tflops: float, tokens_per_sec: float) -> None:
    found = flops_per_token(shape(name, **more), LENGTH) * tokens_per_sec / 1e12
    assert found == pytest.approx(tflops, rel=0.003)  # a block more or less would be 4 %


@pytest.mark.parametrize(
    ("name", "ranks", "tflops", "sequences", "seconds", "digits"),
    [
        ("mixtral_8x7b", 64, 438, 256, 2.982, 5e-4),
        ("mixtral_8x22b", 128, 445, 256, 4.458, 5e-4),
        ("qwen3_30b_a3b", 16, 299.352, 1024, 20.14729, 6e-4),  # published
    ],
)
def test_seconds_of_an_update(
    name: str, ranks: int, tflops: float, sequences: int, seconds: float, digits: float
) -> None:
    words = 32_000 if name == "mixtral_8x22b" else None
    flops = flops_per_token(shape(name, num_words=words), LENGTH) * sequences * LENGTH
    assert seconds_of(flops, ranks, tflops * 1e12) == pytest.approx(seconds, abs=digits)


def test_deepseek_s_own_run() -> None:
    # arXiv 2412.19437: 180 thousand H800 hours for 1e12 tokens, 14.8e12 tokens.
    tokens_per_sec = 1e12 / (180e3 * 3600)
    assert tokens_per_sec == pytest.approx(1543.2, abs=0.05)
    rate = flops_per_token(shape("deepseek_v3"), LENGTH) * tokens_per_sec / 1e12
    further = shape("deepseek_v3", mtp_layers=1, mtp_loss_weight=0.3)
    assert rate == pytest.approx(385.5, abs=0.05)
    assert flops_per_token(further, LENGTH) * tokens_per_sec / 1e12 == pytest.approx(401, abs=0.5)
    assert pytest.approx(2664) == 14.8 * 180


def test_ours_beside_megatron_s() -> None:
    # Between updates, of bfloat16 with float32 copies, ours are the same optimizer bytes and half the gradients'.
    model, spread = shape("mixtral_8x7b"), mapping(64, expert=8, pipe=4)
    parts = stage_parts(model, spread, 1)
    held = held_by(parts, spread, 16, sharded=True)
    theirs = megatron_states(model, spread)
    assert held.expert == theirs.expert / theirs.expert_shards
    whole = sum(entry.numel for part in parts for entry in part.entries if not entry.is_expert)
    assert held.dense * 16 == whole
