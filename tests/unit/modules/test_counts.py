"""Assignments are counted once a pass, on the device; nothing waits for it before a kernel asks for sizes."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fairseq_moe.fused import launch
from fairseq_moe.modules import (
    BranchConfig,
    Experts,
    LocalDispatcher,
    MoELayer,
    Router,
    RouterMode,
    TokenInfo,
    TopKConfig,
    experts,
)
from fairseq_moe.modules.dispatch import rows
from fairseq_moe.modules.dispatch.dispatcher import plan_kept
from fairseq_moe.modules.dispatch.padded import plan_padded
from fairseq_moe.modules.kernels.table import Kernel
from fairseq_moe.modules.routing.bias import BiasConfig, BiasRule
from fairseq_moe.modules.routing.contract import AssignmentCounts, count_assignments
from fairseq_moe.modules.routing.scores import ScoreFunction, ScoreRule
from fairseq_moe.modules.routing.topk import CapacityConfig
from tests.helpers.operators import Operators

T, D, E = 24, 8, 6

# token   0       1       2       3
# choice  2,0,1   0,1,2   2,3,0   3,2,1
# asks    +,+,+   +,+,-   +,-,-   +,+,+
# kept    +,+,+   +,-,-   -,-,-   +,-,+
IDS = torch.tensor([[2, 0, 1], [0, 1, 2], [2, 3, 0], [3, 2, 1]])
REQUESTED = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]], dtype=torch.bool)
KEPT = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0], [1, 0, 1]], dtype=torch.bool)


def counts_of(tokens: slice = slice(None)) -> AssignmentCounts:
    return count_assignments(IDS[tokens], REQUESTED[tokens], KEPT[tokens], num_experts=4)


class TestByHand:
    def test_requested_and_kept(self) -> None:
        counts = counts_of()
        assert counts.requested_E.tolist() == [2, 3, 3, 1]
        assert counts.kept_E.tolist() == [2, 2, 1, 1]
        assert counts.first_choices().tolist() == [1, 0, 2, 1]
        assert int(counts.num_tokens()) == 4

    def test_every_choice_and_fate(self) -> None:
        first, second, later = counts_of().histogram_34E.tolist()
        nothing = [0, 0, 0, 0]
        assert first == [[1, 0, 1, 1], [0, 0, 1, 0], nothing, nothing]
        assert second == [[1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1], nothing]
        assert later == [[0, 2, 0, 0], nothing, [1, 0, 1, 0], nothing]

    def test_padding_is_a_fate_of_its_own(self) -> None:
        padding_T = torch.tensor([False, False, True, False])
        left = ~padding_T.unsqueeze(-1)
        counts = count_assignments(IDS, REQUESTED & left, KEPT & left, num_experts=4, padding_T=padding_T)
        assert int(counts.num_tokens()) == 3
        assert counts.histogram_34E[:, 3].tolist() == [[0, 0, 1, 0], [0, 0, 0, 1], [1, 0, 0, 0]]
        assert counts.requested_E.tolist() == [2, 3, 2, 1]

    def test_counts_of_parts_add_up(self) -> None:
        parts = [counts_of(slice(0, 1)), counts_of(slice(1, 3)), counts_of(slice(3, 4))]
        total = AssignmentCounts.of(torch.stack([part.histogram_34E for part in parts]).sum(0))
        for found, expected in zip(total, counts_of(), strict=True):
            assert torch.equal(found, expected)


# --- whole layers ---

SOFTMAX = ScoreRule(top_k=2)
LOSSES = frozenset({"aux", "seq_aux", "global_aux", "z"})
LAYERS: dict[str, dict[str, Any]] = {
    "branch": {"config": BranchConfig()},
    "branch, one expert": {"config": BranchConfig(top_k=1)},
    "softmax": {"config": TopKConfig(score=SOFTMAX, aux_losses=LOSSES)},
    "capacity": {"config": TopKConfig(score=SOFTMAX, aux_losses=LOSSES, capacity=CapacityConfig(factor=1.0))},
    "padded": {
        "config": TopKConfig(score=SOFTMAX, aux_losses=LOSSES, capacity=CapacityConfig(factor=1.0)),
        "plan": plan_padded,
    },
    "bias": {
        "config": TopKConfig(score=ScoreRule(top_k=2, function=ScoreFunction.SIGMOID)),
        "balance": BiasConfig(rule=BiasRule.SIGN),
    },
}
# Here the loss goes by plain choices, which are not the choices made.
BIAS_AND_LOSS = {
    "config": TopKConfig(score=ScoreRule(top_k=2, function=ScoreFunction.SIGMOID), aux_losses=LOSSES),
    "balance": BiasConfig(rule=BiasRule.SIGN),
}


def layer_of(*, plan: Any = plan_kept, **router: Any) -> MoELayer:
    torch.manual_seed(0)
    return MoELayer(
        router=Router(model_dim=D, num_experts=E, **router),
        experts=Experts(num_local_experts=E, first_expert_id=0, model_dim=D, hidden_dim=8, activation=F.relu),
        dispatcher=LocalDispatcher(plan=plan),
    )


def run(layer: MoELayer, *, padded: bool = True) -> None:
    padding_T = torch.arange(T) % 12 >= 10 if padded else None
    layer(torch.randn(T, D), tokens=TokenInfo(mode=RouterMode.TRAIN, padding_T=padding_T, num_sequences=2))


def _histograms(layer: MoELayer) -> int:
    with Operators() as calls:
        run(layer)
    return sum(calls.names[name] for name in ("scatter_add", "bincount", "histc", "one_hot", "index_put"))


@pytest.mark.parametrize("name", LAYERS)
def test_one_histogram_serves_loss_dispatch_statistics_and_bias(name: str) -> None:
    assert _histograms(layer_of(**LAYERS[name])) == 1


def test_a_loss_that_goes_by_other_choices_counts_those_too() -> None:
    assert _histograms(layer_of(**BIAS_AND_LOSS)) == 2


def test_plain_choices_are_taken_once() -> None:
    found = {}
    for name, options in {"plain": LAYERS["softmax"], "bias": BIAS_AND_LOSS}.items():
        with Operators() as calls:
            run(layer_of(**options))
        found[name] = calls.names["topk"]
    assert found == {
        "plain": 1,
        "bias": 3,
    }  # the choice, the losses of all tokens, and those of each sequence


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_hands_out_what_statistics_follow_from_in_few_launches(name: str) -> None:
    layer = layer_of(**LAYERS[name])
    tokens = TokenInfo(mode=RouterMode.TRAIN, padding_T=torch.arange(T) >= 20, num_sequences=2)
    routed = layer.router(torch.randn(T, D), tokens=tokens)
    with Operators() as calls:
        layer._aux(routed)
    assert calls.names["sort"] == 0
    assert 0 < calls.launches <= 14


class AskedError(Exception):
    """A number was brought to the host."""


class ReachedError(Exception):
    """The experts were called."""


def _stop_where_numbers_come_to_the_host(monkeypatch: pytest.MonkeyPatch) -> TorchDispatchMode:
    """``tolist`` of a tensor of the CPU calls no operator; the others all end in those named below.

    Rows are added up the way they are on a GPU: the one for CPUs may ask, there being no device to wait for.
    """
    waits = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "unique"}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.overloadpacket.__name__ in waits:
                raise AskedError
            return func(*args, **(kwargs or {}))

    def tolist(self: Tensor) -> Any:
        raise AskedError

    monkeypatch.setattr(Tensor, "tolist", tolist)
    monkeypatch.setattr(rows, "_is_for_kernels", lambda rows_RD: True)
    return Watch()


@pytest.mark.parametrize("name", LAYERS)
def test_on_one_rank_nothing_waits_for_the_device_before_the_kernel_asks(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = layer_of(**LAYERS[name])

    def reached(*args: Any) -> None:
        raise ReachedError

    hook = layer.experts.register_forward_pre_hook(reached)
    with (
        monkeypatch.context() as patch,
        _stop_where_numbers_come_to_the_host(patch),
        pytest.raises(ReachedError),
    ):
        run(layer)
    hook.remove()
    if name == "padded":  # sizes are fixed: not even kernels ask
        with monkeypatch.context() as patch, _stop_where_numbers_come_to_the_host(patch):
            run(layer)
    else:
        with (
            monkeypatch.context() as patch,
            _stop_where_numbers_come_to_the_host(patch),
            pytest.raises(AskedError),
        ):
            run(layer)


@pytest.mark.parametrize("name", LAYERS)
def test_the_grouped_kernel_asks_for_no_size(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of(**LAYERS[name])
    monkeypatch.setattr(experts, "choose_kernel", lambda *args, **kwargs: Kernel.GROUPED)
    with monkeypatch.context() as patch, _stop_where_numbers_come_to_the_host(patch):
        run(layer)


@pytest.mark.parametrize("name", LAYERS)
def test_routing_by_the_kernels_of_a_gpu_brings_no_number_to_the_host(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(launch, "DEVICES", {"cpu", "cuda"})
    router = layer_of(**LAYERS[name]).router
    with monkeypatch.context() as patch, _stop_where_numbers_come_to_the_host(patch):
        for padding_T in (None, torch.arange(T) % 12 >= 10):
            tokens = TokenInfo(mode=RouterMode.TRAIN, padding_T=padding_T, num_sequences=2)
            x_TD = torch.randn(T, D).requires_grad_()
            routed = router(x_TD, tokens=tokens)
            again = router(x_TD, tokens=tokens, decision=routed.decision)
            (again.weights_TK.square().sum() + sum(again.losses.values())).backward()


@pytest.mark.parametrize("padded", [False, True])
def test_kernels_agree_about_counts_on_the_device(padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for kernel in (kernel for kernel in Kernel if kernel is not Kernel.FP8):  # which rounds
        monkeypatch.setattr(experts, "choose_kernel", lambda *args, kernel=kernel, **kwargs: kernel)
        layer = layer_of(**LAYERS["capacity" if padded else "softmax"])
        x_TD = torch.randn(T, D, generator=torch.Generator().manual_seed(1)).requires_grad_()
        padding_T = torch.arange(T) % 12 >= 10 if padded else None
        y_TD, _ = layer(x_TD, tokens=TokenInfo(mode=RouterMode.TRAIN, padding_T=padding_T, num_sequences=2))
        y_TD.square().sum().backward()
        found[kernel] = [y_TD, x_TD.grad, *(parameter.grad for parameter in layer.parameters())]
    for kernel in (kernel for kernel in Kernel if kernel is not Kernel.FP8):  # which rounds
        for one, other in zip(found[kernel], found[Kernel.SLICED], strict=True):
            torch.testing.assert_close(one, other)
