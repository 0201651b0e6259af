"""Arguments about parallel axes, as typed, on two ranks: who holds what, and the gradients of one process.

Also what a pipeline by itself accepts and tensor and context ranks refuse, because its stages run stock's layers and
criterions as they are. ``python scripts/layout_parity.py`` has the mixes of axes.
"""

import importlib
import re
from typing import Any, NamedTuple

import pytest

from tests.helpers.ranks import REPOSITORY, run_ranks

_MODEL = "--moe-aux-loss-coeff 0.2 --num-experts 4 --moe-layer-freq [0,1,0,1] --decoder-layers 4"
_P2 = "--pipeline-model-parallel-size 2 --update-freq 2"
_LAYERS, _EXPERTS = {0, 1, 2, 3}, {0, 1, 2, 3}

pytestmark = pytest.mark.timeout(300)  # 21 updates on two ranks, and 12 on one


class _Case(NamedTuple):
    """Flags of two ranks, and what rank 0 holds."""

    flags: str
    layers: set[int]
    experts: set[int]


ARGUMENTS = {
    "pipeline_model_parallel_size": _Case(_P2, {0, 1}, _EXPERTS),
    "num_layers_per_virtual_pipeline_stage": _Case(
        f"{_P2} --num-layers-per-virtual-pipeline-stage 1", {0, 2}, set()
    ),
    "num_virtual_stages_per_pipeline_rank": _Case(
        f"{_P2} --num-virtual-stages-per-pipeline-rank 2", {0, 2}, set()
    ),
    "decoder_first_pipeline_num_layers": _Case(f"{_P2} --decoder-first-pipeline-num-layers 1", {0}, set()),
    "decoder_last_pipeline_num_layers": _Case(
        f"{_P2} --decoder-last-pipeline-num-layers 1", {0, 1, 2}, _EXPERTS
    ),
    "cp_comm_type": _Case("--context-parallel-size 2 --cp-comm-type all_gather", _LAYERS, {0, 1}),
    "expert_model_parallel_size": _Case("--expert-model-parallel-size 1", _LAYERS, _EXPERTS),
    "expert_tensor_parallel_size": _Case("--expert-tensor-parallel-size 2", _LAYERS, _EXPERTS),
    "moe_extended_tp": _Case("--moe-extended-tp --expert-model-parallel-size 2", _LAYERS, _EXPERTS),
    "moe_extended_ep": _Case(
        "--moe-extended-ep --tensor-model-parallel-size 2 --sequence-parallel", _LAYERS, {0, 1}
    ),
}

_V2 = f"{_P2} --num-virtual-stages-per-pipeline-rank 2"
# Flags of the model, which one process has, too.
ACCEPTED = {
    "norms after blocks": "--arch transformer_lm",
    "NormFormer's scales": "--scale-attn --scale-heads --scale-resids",
    "fused attention": "--fused-attention",
    "other widths": "--decoder-input-dim 8 --decoder-output-dim 8 --layernorm-embedding",
    "expert choice": "--moe-router-load-balancing-type expert_choice",
    "Sinkhorn": "--moe-router-load-balancing-type sinkhorn --moe-router-topk 1",
    "quantile balancing": "--moe-router-load-balancing-type quantile_balancing",
    "padded experts": "--moe-expert-capacity-factor 4 --moe-pad-expert-input-to-capacity",
    "cross_entropy": "--criterion cross_entropy",
    "label smoothing": "--criterion label_smoothed_cross_entropy --label-smoothing 0.1",
    "frozen": "--moe-freeze-modules routers,experts",
}


def _nothing(rank: int) -> None:
    pass


def _count_frozen_as_zero() -> None:
    import layout_ranks
    import torch

    read = layout_ranks._gradients_as_values

    def with_zeros(state: Any) -> Any:
        for p in dict(state.named_parameters()).values():
            if not p.requires_grad:
                p.grad = torch.zeros_like(p)
        return read(state)

    layout_ranks._gradients_as_values = with_zeros


class _Compared(NamedTuple):
    """Say how far two ranks are from one process, and what each of them holds."""

    difference: float
    held: list[set[str]]


@pytest.fixture(scope="module")
def compared() -> dict[str, _Compared]:
    """Each case by name, all in one start of two ranks and one of one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(REPOSITORY / "scripts")
        run_ranks(_nothing, 1)
        script = importlib.import_module("layout_parity")
        patch.setattr(script, "MODELS", {"": _MODEL, **{k: f"{_MODEL} {v}" for k, v in ACCEPTED.items()}})
        layouts = {name: script.Layout(name, 2, "", case.flags) for name, case in ARGUMENTS.items()}
        layouts |= {name: script.Layout(name, 2, name, _V2) for name in ACCEPTED}
        alone = {script._alone(layout): None for layout in layouts.values()}
        ran = script.run_jobs(list(alone), prepare=_count_frozen_as_zero)
        references = dict(zip(alone, ran, strict=True))
        reports = script.run_jobs(
            [script._job(each) for each in layouts.values()], prepare=_count_frozen_as_zero
        )
        found = {}
        for (name, layout), report in zip(layouts.items(), reports, strict=True):
            reference = references[script._alone(layout)]
            assert not isinstance(reference, str), reference
            assert not isinstance(report, str), f"{name}: {report}"
            largest, _ = max(script._differences(report, reference[0]))
            largest = max(largest, script._worst_number("loss", report, reference[0]))
            largest = max(largest, script._worst_number("gnorm", report, reference[0]))
            found[name] = _Compared(largest, [set(each.gradients) for each in report])
        return found


@pytest.mark.parametrize("name", [*ARGUMENTS, *ACCEPTED])
def test_two_ranks_give_the_gradients_of_one_process(name: str, compared: dict[str, _Compared]) -> None:
    assert compared[name].difference < 1e-13


@pytest.mark.parametrize("name", ARGUMENTS)
def test_the_argument_says_what_a_rank_holds(name: str, compared: dict[str, _Compared]) -> None:
    names = " ".join(compared[name].held[0])
    assert {int(number) for number in re.findall(r"\blayers\.(\d+)\.", names)} == ARGUMENTS[name].layers
    assert {int(number) for number in re.findall(r"experts\.fc1_weight\[(\d+)\]", names)} == ARGUMENTS[
        name
    ].experts


@pytest.mark.parametrize("name", ACCEPTED)
def test_interleaved_stages_share_the_layers(name: str, compared: dict[str, _Compared]) -> None:
    """Both ranks have experts, or words at least, that the other has not."""
    first, last = compared[name].held
    assert first - last and last - first
