"""Every way to route, on a GPU, against the same layer on CPU in float32; waits and memory of a pass."""

import warnings
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fairseq_moe.modules import (
    Experts,
    LocalDispatcher,
    MoELayer,
    Router,
    RouterMode,
    TokenInfo,
    TopKConfig,
    experts,
)
from fairseq_moe.modules.dispatch.rows import ExpertWork, plan_rows
from fairseq_moe.modules.kernels.swiglu import swiglu
from fairseq_moe.modules.kernels.table import Kernel, choose_kernel
from fairseq_moe.modules.moe_layer import RoutingMemo
from fairseq_moe.modules.routing.scores import ScoreRule
from fairseq_moe.modules.routing.topk import Choice, TopKRule
from tests.helpers.kernel_comparison import without_kernels
from tests.helpers.layer_cases import (
    DRAWN,
    LAYER_CASES,
    MODES,
    RECOMPUTED,
    TOKENS,
    assert_same_layer,
    layer_of,
    layer_results,
)

CPU = torch.device("cpu")
# Of each result's norm. On one H200 (2026-11-27), before there were kernels: float32 within 9e-7, bfloat16 within 5e-3.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
KERNELS = [Kernel.LOOP, Kernel.BMM, Kernel.TRITON, Kernel.GROUPED]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", LAYER_CASES)
def test_as_on_cpu(name: str, dtype: torch.dtype, device: torch.device) -> None:
    layer, mode = layer_of(**LAYER_CASES[name]), MODES.get(name, RouterMode.TRAIN)
    given = {"rounded": dtype, "mode": mode}
    if (
        name in RECOMPUTED and dtype is not torch.float32
    ):  # with the same layer, which takes the same decision
        plain = layer_of(**LAYER_CASES[name] | {"recompute": False})
        expected, decision = layer_results(plain, dtype=dtype, device=device, **given)
    else:
        expected, decision = layer_results(layer, dtype=torch.float32, device=CPU, **given)
    takes_own = (dtype is torch.float32 and name not in DRAWN) or name in RECOMPUTED
    found, _ = layer_results(
        layer, dtype=dtype, device=device, **given, decision=None if takes_own else decision
    )
    assert_same_layer(found, expected, tolerance=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "name", ["softmax", "sigmoid with bias", "capacity by position", "branch, two experts"]
)
def test_half_precision_chooses_as_float32_but_for_near_ties(
    name: str, dtype: torch.dtype, device: torch.device
) -> None:
    layer = layer_of(**LAYER_CASES[name])
    _, expected = layer_results(layer, dtype=torch.float32, device=CPU, rounded=dtype)
    _, found = layer_results(layer, dtype=dtype, device=device, rounded=dtype)
    same = (found.expert_ids_TK.cpu() == expected.expert_ids_TK).double().mean()
    assert same > 0.93


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("choice", [Choice.SINKHORN, Choice.EXPERT, Choice.TOKEN])
def test_equal_logits_give_equal_choices_in_equal_order(
    choice: Choice, dtype: torch.dtype, device: torch.device
) -> None:
    """The order of a token's choices and of the rows, from the same logits, in half precision with ties in them."""
    if choice is Choice.TOKEN and dtype is not torch.float32:
        pytest.skip("torch.topk leaves open which of two equal logits is chosen")
    generator = torch.Generator().manual_seed(5)
    logits_TE = torch.randn(500, 8, generator=generator).to(dtype)
    decisions = []
    for where in (CPU, device):
        rule = TopKRule(TopKConfig(score=ScoreRule(top_k=2), choice=choice))
        decision = rule.route(logits_TE.to(where), TokenInfo(mode=RouterMode.TRAIN)).decision
        num_rows = int(decision.counts.kept_E.sum())
        plan = plan_rows(decision).first(num_rows)
        decisions.append(
            (decision.expert_ids_TK, decision.kept_TK, decision.counts.histogram_34E, plan.token_R)
        )
    for on_cpu, on_device in zip(*decisions, strict=True):
        assert torch.equal(on_cpu, on_device.cpu())


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "name", ["capacity by probability", "swiglu experts and shared ones", "expert choice"]
)
def test_every_kernel(
    name: str, kernel: Kernel, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = layer_of(**LAYER_CASES[name])
    expected, decision = layer_results(layer, dtype=torch.float32, device=CPU, rounded=dtype)
    monkeypatch.setattr(experts, "choose_kernel", lambda *args, **kwargs: kernel)
    found, _ = layer_results(layer, dtype=dtype, device=device, rounded=dtype, decision=decision)
    assert_same_layer(found, expected, tolerance=TOLERANCE[dtype])


def large_layer(
    cuda: torch.device, *, width: int = 1024, hidden: int = 512, num_experts: int = 16
) -> MoELayer:
    """Gated experts in bfloat16."""
    torch.manual_seed(0)
    return (
        MoELayer(
            router=Router(
                model_dim=width,
                num_experts=num_experts,
                config=TopKConfig(score=ScoreRule(top_k=4), aux_losses=frozenset({"aux"})),
            ),
            experts=Experts(
                num_local_experts=num_experts,
                first_expert_id=0,
                model_dim=width,
                hidden_dim=hidden,
                activation=swiglu,
            ),
            dispatcher=LocalDispatcher(),
        )
        .to(cuda)
        .bfloat16()
    )


def tokens_on(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, TokenInfo]:
    """Tokens for ``layer_of``, with padding."""
    x = torch.randn(TOKENS, 64, device=device, dtype=dtype, requires_grad=True)
    number_T = torch.arange(TOKENS, device=device)
    info = TokenInfo(mode=RouterMode.TRAIN, ids_T=number_T, padding_T=number_T % 24 >= 22, num_sequences=4)
    return x, info


def run(layer: MoELayer, x: Tensor, tokens: TokenInfo) -> None:
    """Run forward and backward."""
    y, aux = layer(x, tokens=tokens)
    (y.sum() + aux.losses.sum()).backward()


# Between ranks the host waits for counts. A recomputation restores the state of the generator, which lies on the host.
WITHOUT_A_WAIT = [
    name
    for name in LAYER_CASES
    if name
    not in ("all-to-all", "all-gather", "experts recomputed", "shared experts with a gate", *RECOMPUTED)
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", WITHOUT_A_WAIT)
def test_nothing_waits_for_the_device_on_one_rank(name: str, dtype: torch.dtype, cuda: torch.device) -> None:
    layer = layer_of(**LAYER_CASES[name]).to(cuda, dtype)
    x, tokens = tokens_on(cuda, dtype)
    run(layer, x, tokens)  # kernels are compiled
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(layer, x, tokens)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["all-to-all"])
def test_the_host_waits_once_at_most_between_ranks(name: str, cuda: torch.device) -> None:
    layer = layer_of(**LAYER_CASES[name]).to(cuda, torch.bfloat16)
    x, tokens = tokens_on(cuda, torch.bfloat16)
    run(layer, x, tokens)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run(layer, x, tokens)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert sum("synchronizing" in str(warning.message) for warning in caught) <= 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_large_layer_computes_what_it_does_without_kernels(
    dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_tokens, width = (8192, 1024) if device.type == "cuda" else (64, 32)
    layer = large_layer(device, width=width, hidden=width // 2).to(dtype)
    info, memo = TokenInfo(mode=RouterMode.TRAIN), RoutingMemo()
    generator = torch.Generator(device).manual_seed(2)
    start = torch.randn(num_tokens, width, device=device, generator=generator).to(dtype)
    results = []
    for has_kernels in (True, False):
        monkeypatch.setattr(
            experts, "choose_kernel", choose_kernel if has_kernels else lambda *_, **__: "loop"
        )
        x = start.clone().requires_grad_()
        layer.zero_grad()
        with nullcontext() if has_kernels else without_kernels():
            y, aux = layer(x, tokens=info, memo=memo)
            ((y * start).sum() + aux.losses.sum()).backward()
        found = {"output": y, "losses": aux.losses, "grad of tokens": x.grad}
        found |= {f"grad of {name}": p.grad for name, p in layer.named_parameters()}
        results.append({name: value.detach().double() for name, value in found.items() if value is not None})
    assert len(results[0]) == 6
    assert_same_layer(results[0], results[1], tolerance=TOLERANCE[dtype])


def test_a_layer_keeps_its_input_and_the_values_before_the_activation(cuda: torch.device) -> None:
    """2 D T + 4 F R bytes in bfloat16, gated, and a few numbers per row and per token and expert."""
    tokens, width, hidden, top_k, num_experts = 4096, 1024, 512, 4, 16
    layer = large_layer(cuda, width=width, hidden=hidden, num_experts=num_experts)
    info = TokenInfo(mode=RouterMode.TRAIN)
    x = torch.randn(tokens, width, device=cuda, dtype=torch.bfloat16, requires_grad=True)
    layer(x, tokens=info)[0].sum().backward()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y, aux = layer(x, tokens=info)
    torch.cuda.synchronize()
    kept = torch.cuda.memory_allocated() - before - y.numel() * y.element_size()
    rows = tokens * top_k
    assert aux.losses.isfinite().all()
    assert kept <= 4 * hidden * rows + 64 * rows + 32 * tokens * num_experts + 2**20
    torch.cuda.reset_peak_memory_stats()
    y.sum().backward()
    peak = torch.cuda.max_memory_allocated() - before
    # Besides gradients of the experts: rows, their gradients and outputs, hidden values twice.
    gradients = sum(p.numel() * p.element_size() for p in layer.parameters())
    assert peak <= gradients + 2 * rows * (3 * width + 8 * hidden) + 2**24


def test_dropout_is_drawn_on_the_device(device: torch.device) -> None:
    layer = Experts(
        num_local_experts=4, first_expert_id=0, model_dim=64, hidden_dim=64, activation=F.gelu, dropout=0.5
    ).to(device)
    y = layer(torch.randn(400, 64, device=device), ExpertWork(counts_L=[100] * 4))
    assert 0.4 < float((y == 0).float().mean()) < 0.6
