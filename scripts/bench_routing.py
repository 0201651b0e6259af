"""What a routing choice costs: time of the router alone and of the whole layer, forward and backward.

    python scripts/bench_routing.py [--rounds N] [--json FILE]

One rank, one thread, float32. Every row changes one thing against the first row. Rounds go through all rows
in turn; the router's time is the median over rounds, and the layer's cost is the median over rounds of its
time divided by the first row's in the same round.
"""

import argparse
import json
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.nn.functional as F
from bench_machine import environment, timed_ms
from torch import Tensor

from fairseq_moe.modules import Experts, LocalDispatcher, MoELayer, Router, RouterMode, TokenInfo, TopKConfig
from fairseq_moe.modules.dispatch.allgather import AllGatherDispatcher
from fairseq_moe.modules.dispatch.exchange import LocalExchange
from fairseq_moe.modules.dispatch.padded import plan_padded
from fairseq_moe.modules.routing.bias import BiasConfig, BiasRule
from fairseq_moe.modules.routing.branch import BranchConfig
from fairseq_moe.modules.routing.capacity import DropPolicy
from fairseq_moe.modules.routing.router import ScorerConfig
from fairseq_moe.modules.routing.scores import ScoreFunction, ScoreRule
from fairseq_moe.modules.routing.topk import CapacityConfig, Choice

SEQUENCES = 8
DEFAULT = TopKConfig(score=ScoreRule(top_k=2), aux_losses=frozenset({"aux"}))
LINEAR = ScorerConfig()
SIGMOID = ScoreRule(top_k=2, function=ScoreFunction.SIGMOID)


@dataclass(frozen=True)
class Row:
    """One measured choice.

    Args:
        config: the routing rule.
        scorer: how logits are computed.
        bias: how the expert bias follows the load.
        dispatcher: alltoall, padded or allgather.
    """

    config: TopKConfig | BranchConfig = DEFAULT
    scorer: ScorerConfig = LINEAR
    bias: BiasConfig | None = None
    dispatcher: str = "alltoall"


def _losses(*names: str) -> Row:
    return Row(replace(DEFAULT, aux_losses=frozenset(names)))


def _capacity(policy: DropPolicy) -> Row:
    return Row(replace(DEFAULT, capacity=CapacityConfig(factor=1.0, policy=policy)))


ROWS: dict[str, Row] = {
    "softmax, top-2, aux_loss (base)": Row(),
    "no loss": _losses(),
    "seq_aux_loss": _losses("seq_aux"),
    "global_aux_loss": _losses("global_aux"),
    "aux_loss and z-loss": _losses("aux", "z"),
    "sigmoid scores": Row(replace(DEFAULT, score=SIGMOID)),
    "sigmoid, expert bias, no loss": Row(TopKConfig(score=SIGMOID), bias=BiasConfig(rule=BiasRule.SIGN)),
    "quantile balancing": Row(TopKConfig(score=SIGMOID), bias=BiasConfig(rule=BiasRule.QUANTILE)),
    "4 of 8 groups": Row(replace(DEFAULT, score=ScoreRule(top_k=8, num_groups=8, group_topk=4))),
    "top-8": Row(replace(DEFAULT, score=ScoreRule(top_k=8))),
    "sinkhorn": Row(TopKConfig(score=ScoreRule(top_k=2), choice=Choice.SINKHORN)),
    "expert choice": Row(TopKConfig(score=ScoreRule(top_k=2), choice=Choice.EXPERT)),
    "round robin": Row(replace(DEFAULT, choice=Choice.ROUND_ROBIN)),
    "X-MoE's cosine router": Row(scorer=ScorerConfig(cosine=True)),
    "fp64 router": Row(scorer=ScorerConfig(dtype=torch.float64)),
    "input jitter": Row(scorer=ScorerConfig(jitter_eps=0.01)),
    "capacity 1.0, probs": _capacity(DropPolicy.PROBS),
    "capacity 1.0, position": _capacity(DropPolicy.POSITION),
    "capacity 1.0, prioritized": _capacity(DropPolicy.PRIORITIZED),
    "capacity 1.0, probs, padded": replace(_capacity(DropPolicy.PROBS), dispatcher="padded"),
    "dispatcher allgather": Row(dispatcher="allgather"),
    "the branch's top-2 gate": Row(BranchConfig()),
}


def build(row: Row, args: argparse.Namespace) -> MoELayer:
    """The layer of one row."""
    dispatchers: dict[str, Callable[[], Any]] = {
        "alltoall": lambda: LocalDispatcher(),
        "padded": lambda: LocalDispatcher(plan=plan_padded),
        "allgather": lambda: AllGatherDispatcher(LocalExchange(), first_expert_id=0),
    }
    torch.manual_seed(0)
    return MoELayer(
        router=Router(
            model_dim=args.model_dim,
            num_experts=args.experts,
            config=row.config,
            scorer=row.scorer,
            balance=row.bias,
        ),
        experts=Experts(
            num_local_experts=args.experts,
            first_expert_id=0,
            model_dim=args.model_dim,
            hidden_dim=args.hidden_dim,
            activation=F.gelu,
        ),
        dispatcher=dispatchers[row.dispatcher](),
    )


def steps(layer: MoELayer, x_TD: Tensor) -> tuple[Callable[[], None], Callable[[], None]]:
    """Forward and backward of the router alone, and of the whole layer."""
    tokens = TokenInfo(mode=RouterMode.TRAIN, num_sequences=SEQUENCES)

    def router() -> None:
        layer.zero_grad(set_to_none=True)
        routed = layer.router(x_TD, tokens=tokens)
        (routed.weights_TK.sum() + sum(routed.losses.values())).backward()

    def whole() -> None:
        layer.zero_grad(set_to_none=True)
        y_TD, aux = layer(x_TD, tokens=tokens)
        (y_TD.sum() + aux.losses.sum()).backward()

    return router, whole


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A dictionary per row."""
    x_TD = torch.randn(args.tokens, args.model_dim)
    runs = {name: steps(build(row, args), x_TD) for name, row in ROWS.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ROWS}
    cpu = torch.device("cpu")
    for round_number in range(args.rounds + 1):
        for name, (router, whole) in runs.items():
            found = timed_ms(router, cpu), timed_ms(whole, cpu)
            if round_number > 0:
                times[name].append(found)
    base = next(iter(times.values()))
    return [
        {
            "routing": name,
            "router_ms": round(statistics.median(router for router, _ in found), 1),
            "layer_ratio": round(
                statistics.median(
                    whole / base_whole for (_, whole), (_, base_whole) in zip(found, base, strict=True)
                ),
                2,
            ),
        }
        for name, found in times.items()
    ]


def table(results: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| routing | router alone, ms | whole layer, against the first row |", "|---|--:|--:|"]
    lines += [f"| {row['routing']} | {row['router_ms']} | {row['layer_ratio']:.2f} |" for row in results]
    return "\n".join(lines)


def main() -> None:
    """Measure, print a table and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--model-dim", type=int, default=512)
    parser.add_argument("--hidden-dim", type=int, default=512)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="also write everything into this file")
    args = parser.parse_args()
    report = environment(torch.device("cpu"))
    report["results"] = measure(args)
    print(table(report["results"]))
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
