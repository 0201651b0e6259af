"""How often the host waits for the device in a layer's forward and backward pass, with the kernels that a GPU takes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fairseq_moe.fused import launch
from fairseq_moe.modules import (
    AllToAllDispatcher,
    BranchConfig,
    Dispatcher,
    Experts,
    LocalDispatcher,
    MoELayer,
    Router,
    RouterMode,
    TokenInfo,
    TopKConfig,
    experts,
)
from fairseq_moe.modules.dispatch.dispatcher import plan_kept
from fairseq_moe.modules.dispatch.exchange import LocalExchange
from fairseq_moe.modules.dispatch.host_copy import HostCopy
from fairseq_moe.modules.dispatch.padded import plan_padded
from fairseq_moe.modules.kernels.table import Kernel
from fairseq_moe.modules.routing.scores import ScoreFunction, ScoreRule
from fairseq_moe.modules.routing.topk import CapacityConfig, Choice
from fairseq_moe.modules.shards import LocalShards, Shards

T, D, E = 24, 8, 4
SCORE = ScoreRule(top_k=2)
CONFIGS: dict[str, Any] = {
    "branch": BranchConfig(),
    "softmax": TopKConfig(score=SCORE, aux_losses=frozenset({"aux", "seq_aux", "z"})),
    "sigmoid": TopKConfig(
        score=ScoreRule(top_k=2, function=ScoreFunction.SIGMOID), aux_losses=frozenset({"aux"})
    ),
    "capacity": TopKConfig(score=SCORE, capacity=CapacityConfig(factor=0.8)),
    "expert": TopKConfig(score=SCORE, choice=Choice.EXPERT),
    "sinkhorn": TopKConfig(score=SCORE, choice=Choice.SINKHORN),
}
PADDED = TopKConfig(score=SCORE, capacity=CapacityConfig(factor=1.0, max_tokens=T))
# Operators that end in a number on the host, or in a shape that only the data tells.
WAITS = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "unique"}


@pytest.fixture(autouse=True)
def _kernels_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(launch, "DEVICES", {"cpu", "cuda"})


class Waits(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in WAITS:
            self.found.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    with monkeypatch.context() as patch, Waits() as waits:
        tolist = Tensor.tolist

        def noted(self: Tensor) -> Any:
            waits.found.append("tolist")
            return tolist(self)

        patch.setattr(Tensor, "tolist", noted)
        yield waits.found


class ManyRanks(LocalShards):
    """Other ranks have tokens of the micro-batch, and count none of them."""

    context = tensor = 2


def layer_of(config: Any, dispatcher: Dispatcher, shards: Shards | None = None) -> MoELayer:
    torch.manual_seed(0)
    return MoELayer(
        router=Router(model_dim=D, num_experts=E, config=config, shards=shards),
        experts=Experts(
            num_local_experts=E, first_expert_id=0, model_dim=D, hidden_dim=16, activation=F.gelu
        ),
        dispatcher=dispatcher,
    )


def run(layer: MoELayer) -> list[Tensor]:
    x_TD = torch.randn(T, D, generator=torch.Generator().manual_seed(1)).requires_grad_()
    tokens = TokenInfo(mode=RouterMode.TRAIN, padding_T=torch.arange(T) % 12 >= 10, num_sequences=2)
    y_TD, aux = layer(x_TD, tokens=tokens)
    (y_TD.square().sum() + aux.losses.sum()).backward()
    assert x_TD.grad is not None
    return [y_TD.detach(), x_TD.grad, *(p.grad for p in layer.parameters() if p.grad is not None)]


@pytest.mark.parametrize(
    ("name", "kernel"), [*((name, Kernel.GROUPED) for name in CONFIGS), ("capacity", Kernel.TRITON)]
)
def test_none_on_one_rank(name: str, kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "choose_kernel", lambda *args, **kwargs: kernel)
    layer = layer_of(CONFIGS[name], LocalDispatcher())
    with counted(monkeypatch) as waits:
        found = run(layer)
    assert waits == []
    monkeypatch.setattr(launch, "DEVICES", {"cuda"})
    monkeypatch.setattr(experts, "choose_kernel", lambda *args, **kwargs: Kernel.SLICED)
    for a, b in zip(found, run(layer_of(CONFIGS[name], LocalDispatcher())), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["branch", "softmax", "sigmoid"])
def test_none_to_count_what_other_ranks_have(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "choose_kernel", lambda *args, **kwargs: Kernel.GROUPED)
    found = []
    for shards in (ManyRanks(), None):
        layer = layer_of(CONFIGS[name], LocalDispatcher(), shards)
        with counted(monkeypatch) as waits:
            found.append(run(layer))
        assert waits == []
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_one_between_ranks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "choose_kernel", lambda *args, **kwargs: Kernel.GROUPED)
    layer = layer_of(CONFIGS[name], AllToAllDispatcher(LocalExchange(), plan=plan_kept))
    with counted(monkeypatch) as waits:
        run(layer)
    assert waits == ["tolist"]


def test_a_kernel_that_counts_on_the_host_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "choose_kernel", lambda *args, **kwargs: Kernel.LOOP)
    with counted(monkeypatch) as waits:
        run(layer_of(CONFIGS["softmax"], LocalDispatcher()))
    assert waits == ["tolist"]


@pytest.mark.parametrize("dispatcher", ["local", "alltoall"])
def test_none_where_shapes_are_fixed(dispatcher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    between = AllToAllDispatcher(LocalExchange(), plan=plan_padded)
    layer = layer_of(PADDED, LocalDispatcher(plan=plan_padded) if dispatcher == "local" else between)
    monkeypatch.setattr(experts, "choose_kernel", lambda *args, **kwargs: Kernel.BMM)
    with counted(monkeypatch) as waits:
        run(layer)
    assert waits == []


@pytest.mark.parametrize("name", ["capacity", "expert"])
def test_rows_that_are_taken_while_counts_travel_change_nothing(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for is_on_its_way in (False, True):
        monkeypatch.setattr(HostCopy, "is_on_its_way", is_on_its_way)
        found.append(run(layer_of(CONFIGS[name], AllToAllDispatcher(LocalExchange(), plan=plan_kept))))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
