"""Whole layers for bench_gpu.py: ours, its products alone, a dense network, and other packages' layers."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from bench_gpu_peers import PEERS, LayerSize
from bench_gpu_timer import Bench, Step, device_events
from torch import Tensor, nn

from fairseq_moe.modules.dispatch.dispatcher import LocalDispatcher
from fairseq_moe.modules.experts import Experts
from fairseq_moe.modules.kernels.swiglu import swiglu
from fairseq_moe.modules.moe_layer import MoELayer
from fairseq_moe.modules.routing.contract import RouterMode, TokenInfo
from fairseq_moe.modules.routing.router import Router
from fairseq_moe.modules.routing.scores import ScoreRule
from fairseq_moe.modules.routing.stats import layer_stats
from fairseq_moe.modules.routing.topk import TopKConfig

__all__ = ["layer", "routing"]


@dataclass(frozen=True)
class Size:
    """T, D, F, E, K of a layer."""

    tokens: int
    model_dim: int
    hidden_dim: int
    experts: int
    top_k: int

    def __str__(self) -> str:
        return f"{self.tokens}, {self.model_dim}, {self.hidden_dim}, {self.experts}, {self.top_k}"

    @property
    def rows(self) -> int:
        """Rows of the experts."""
        return self.tokens * self.top_k


# Each with its goal in useful TFLOPS, forward and backward.
LAYERS = {
    Size(16384, 2048, 768, 128, 8): 470,
    Size(24576, 1536, 256, 128, 8): 350,
    Size(16384, 2048, 1408, 64, 6): 520,
    Size(32768, 4096, 14336, 8, 2): 620,
    Size(16384, 4096, 2048, 64, 8): 540,
}
SMALL = Size(32, 16, 16, 4, 2)


def our_layer(bench: Bench, size: Size) -> MoELayer:
    """The layer with real top-k routing and a balance loss."""
    torch.manual_seed(0)
    config = TopKConfig(score=ScoreRule(top_k=size.top_k), aux_losses=frozenset({"aux"}))
    with bench.device:
        layer = MoELayer(
            router=Router(model_dim=size.model_dim, num_experts=size.experts, config=config),
            experts=Experts(
                num_local_experts=size.experts,
                first_expert_id=0,
                model_dim=size.model_dim,
                hidden_dim=size.hidden_dim,
                activation=swiglu,
            ),
            dispatcher=LocalDispatcher(),
        )
    return layer.bfloat16()


def passes(bench: Bench, module: nn.Module, run: Callable[[Tensor], Tensor], size: Size) -> Step:
    """Forward and backward of a module on random tokens."""
    x = bench.random(size.tokens, size.model_dim).requires_grad_()
    grad = bench.random(size.tokens, size.model_dim)

    def step() -> None:
        x.grad = None
        module.zero_grad(set_to_none=True)
        y = run(x)
        y.backward(grad.view(y.shape))

    return step


def dense_eager(bench: Bench, size: Size) -> Step:
    """One SwiGLU network on all rows, in plain torch."""
    with bench.device:
        fc1 = nn.Linear(size.model_dim, 2 * size.hidden_dim, bias=False).bfloat16()
        fc2 = nn.Linear(size.hidden_dim, size.model_dim, bias=False).bfloat16()
    many = Size(size.rows, size.model_dim, size.hidden_dim, 1, 1)
    return passes(bench, nn.ModuleList([fc1, fc2]), lambda x: fc2(swiglu(fc1(x))), many)


def products_alone(bench: Bench, size: Size) -> Step:
    """The six grouped products of a pass, on equal rows."""
    rows = size.rows // size.experts * size.experts
    x, w1 = (
        bench.random(rows, size.model_dim),
        bench.random(size.experts, 2 * size.hidden_dim, size.model_dim),
    )
    a, w2 = bench.random(rows, size.hidden_dim), bench.random(size.experts, size.model_dim, size.hidden_dim)
    ends = torch.arange(1, size.experts + 1, device=bench.device, dtype=torch.int32) * (rows // size.experts)

    def step() -> None:
        h = F.grouped_mm(x, w1.transpose(1, 2), offs=ends)
        y = F.grouped_mm(a, w2.transpose(1, 2), offs=ends)
        F.grouped_mm(y, w2, offs=ends)
        F.grouped_mm(y.t(), a, offs=ends)
        F.grouped_mm(h, w1, offs=ends)
        F.grouped_mm(h.t(), x, offs=ends)

    return step


def layer(bench: Bench) -> list[dict[str, Any]]:
    """Useful TFLOPS of whole layers, beside their products alone and other packages' layers."""
    found = []
    for size, goal in ({SMALL: 0} if bench.is_small else LAYERS).items():
        if not bench.has_time(str(size)):
            continue
        flops = 18 * size.rows * size.model_dim * size.hidden_dim
        row: dict[str, Any] = {"T, D, F, E, K": str(size), "goal": goal}
        for name, step in layer_ways(bench, size):
            try:
                row[name] = flops / bench.ms(step) / 1e9
            except Exception as error:
                row[name] = f"{type(error).__name__}: {str(error)[:60]}"
        found.append(row)
    return found


def layer_ways(bench: Bench, size: Size) -> Iterator[tuple[str, Step]]:
    """Ways to compute a layer, made one after the other, so that one at a time takes memory."""
    yield "MoE layer", our_passes(bench, size)
    yield "products alone", products_alone(bench, size)
    yield "dense eager", dense_eager(bench, size)
    for name, make in PEERS.items():
        yield name, peer_passes(bench, size, make)


def our_passes(bench: Bench, size: Size) -> Step:
    """Forward and backward of our layer."""
    layer, tokens = our_layer(bench, size), TokenInfo(mode=RouterMode.TRAIN)
    return passes(bench, layer, lambda x: layer(x, tokens=tokens)[0], size)


def peer_passes(bench: Bench, size: Size, make: Callable[[LayerSize], Any]) -> Step:
    """Forward and backward of another package's layer; raises when it runs, where that is missing."""
    try:
        with bench.device:
            module, run = make(size)
    except Exception as error:
        return _missing(error)
    return passes(bench, module.to(bench.device).bfloat16(), run, size)


def _missing(error: Exception) -> Step:
    found = error

    def step() -> None:
        raise found

    return step


def routing(bench: Bench) -> list[dict[str, Any]]:
    """Router, plan and statistics of a layer, forward: milliseconds of device and host, and launches."""
    size = SMALL if bench.is_small else Size(16384, 2048, 16, 128, 8)
    layer, dispatcher = our_layer(bench, size), LocalDispatcher()
    x, tokens = bench.random(size.tokens, size.model_dim), TokenInfo(mode=RouterMode.TRAIN)

    def step() -> None:
        routed = layer.router(x, tokens=tokens)
        dispatcher.send(x, routed.decision, routed.weights_TK)
        aux = layer._aux(routed)
        layer_stats(aux.histogram_34E.unsqueeze(0), aux.measures_4.unsqueeze(0))

    row: dict[str, Any] = {"T, E, K": f"{size.tokens}, {size.experts}, {size.top_k}", "goal, ms": 0.5}
    row |= {"ms": bench.ms(step), "host, ms": bench.host_ms(step)}
    if bench.device.type == "cuda":
        with torch.profiler.profile() as profile:
            step()
            torch.cuda.synchronize()
        row["launches"] = sum(event.count for event in device_events(profile))
    return [row]
