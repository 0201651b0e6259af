"""gpt-oss's experts and router against transformers' classes, in float64: outputs, weights and every gradient.

On one rank, with experts spread over 2 and 4, and with each expert in halves. Run with
``pytest tests/numerics/test_gpt_oss_against_transformers.py``.
"""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.ranks import run_ranks

D, F, E, K, T = 12, 8, 8, 3, 24  # T divides by every number of ranks
ALPHA, LIMIT = 1.702, 0.6  # which many values exceed
FLAGS = {"num_experts": E, "moe_router_topk": K, "moe_router_bias": True, "moe_layer_freq": "1"}
STACKS = ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")
# Names in the reference of what our layer holds.
ROUTER = ("router.weight", "router.bias")


@functools.cache
def reference() -> dict[str, Tensor]:
    """Parameters in our layout, tokens, and what transformers makes of them; gradients are named ``grad of``."""
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts, GptOssTopKRouter

    config = GptOssConfig(
        hidden_size=D,
        intermediate_size=F,
        num_local_experts=E,
        num_experts_per_tok=K,
        swiglu_alpha=ALPHA,
        swiglu_limit=LIMIT,
    )
    config._experts_implementation = "eager"
    router, experts = GptOssTopKRouter(config).double(), GptOssExperts(config).double()
    generator = torch.Generator().manual_seed(3)
    for parameter in (*router.parameters(), *experts.parameters()):
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    x_TD = torch.randn(T, D, generator=generator).double().requires_grad_()
    upper_TD = torch.randn(T, D, generator=generator).double()
    _, weights_TK, ids_TK = router(x_TD)
    y_TD = experts(x_TD, ids_TK, weights_TK)
    y_TD.backward(upper_TD)
    found = {"x": x_TD, "y": y_TD, "weights": weights_TK, "grad of x": x_TD.grad, "upper": upper_TD}
    found |= {"ids": ids_TK}
    for name, parameter in (
        *((f"router.{name}", p) for name, p in router.named_parameters()),
        ("fc1_weight", experts.gate_up_proj),
        ("fc1_bias", experts.gate_up_proj_bias),
        ("fc2_weight", experts.down_proj),
        ("fc2_bias", experts.down_proj_bias),
    ):
        for key, values in ((name, parameter), (f"grad of {name}", parameter.grad)):
            assert values is not None
            found[key] = _in_our_layout(name, values)
    return {name: values.detach().clone() for name, values in found.items()}


def _in_our_layout(name: str, theirs: Tensor) -> Tensor:
    """Turn matrices round, and put the gate's rows before those of up, which alternate there."""
    if name.endswith("_weight"):
        theirs = theirs.transpose(1, 2)
    return torch.cat([theirs[:, ::2], theirs[:, 1::2]], dim=1) if name.startswith("fc1") else theirs


def _half(name: str, whole: Tensor, index: int, count: int) -> Tensor:
    """Cut out what a part of an expert's width has of a stack."""
    if name.startswith("fc1"):
        return torch.cat([half.chunk(count, 1)[index] for half in whole.chunk(2, 1)], 1)
    return whole.chunk(count, 2)[index] if name == "fc2_weight" else whole


def _layer(mesh: Any, given: dict[str, Tensor], *, alpha: float | None = ALPHA) -> Any:
    from fairseq_moe.flags.blocks import BlocksConfig
    from fairseq_moe.flags.moe import MoEConfig
    from fairseq_moe.models.decoder_layer import build_moe_layer

    blocks = BlocksConfig(gated_ffn=True, gated_ffn_bias=True, swiglu_limit=LIMIT, swiglu_alpha=alpha)
    layer = build_moe_layer(
        MoEConfig.from_args(FLAGS),
        mesh,
        model_dim=D,
        hidden_dim=F,
        activation=blocks.gated_activation(),
        activation_dropout=0.0,
        dropout=0.0,
        init_std=blocks.std,
        gated_bias=blocks.gated_ffn_bias,
    ).double()
    ids, (index, count) = list(mesh.layout.local_ids(mesh.rank)), layer.experts.part
    with torch.no_grad():
        for name in ROUTER:
            layer.get_parameter(name).copy_(given[name])
        for name in STACKS:
            layer.experts.get_parameter(name).copy_(_half(name, given[name][ids], index, count))
    return layer


def _on_rank(
    rank: int, given: dict[str, Tensor], ep_size: int, parts: int, change: Callable[[Any], None] | None
) -> dict[str, Any]:
    """Compute this rank's tokens; its outputs, weights and gradients, and where its experts lie."""
    from fairseq_moe.distributed import parallel_mesh, world_size
    from fairseq_moe.modules import RouterMode, TokenInfo

    mesh = parallel_mesh(E, ep_size, parts)
    layer = _layer(mesh, given)
    if change is not None:
        change(layer)
    x_TD, upper_TD = (given[name].chunk(world_size())[rank] for name in ("x", "upper"))
    x_TD = x_TD.clone().requires_grad_()
    tokens = TokenInfo(mode=RouterMode.TRAIN)
    routed = layer.router(x_TD, tokens=tokens)
    y_TD, _ = layer(x_TD, tokens=tokens)
    y_TD.backward(upper_TD)
    found = {"y": y_TD.detach(), "weights": routed.weights_TK.detach(), "grad of x": x_TD.grad}
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return {
        **found,
        "ids": routed.decision.expert_ids_TK,
        "gradients": gradients,
        "experts": list(mesh.layout.local_ids(rank)),
        "part": layer.experts.part,
    }


def largest_difference(given: dict[str, Tensor], by_rank: list[dict[str, Any]]) -> float:
    """Of what all ranks found from the reference, experts' gradients part by part."""
    pairs = [
        (torch.cat([found[name] for found in by_rank]), given[name]) for name in ("y", "weights", "grad of x")
    ]
    assert torch.equal(torch.cat([found["ids"] for found in by_rank]), given["ids"])
    for name in ROUTER:  # of its own tokens on each rank
        pairs.append((sum(found["gradients"][name] for found in by_rank), given[f"grad of {name}"]))
    for found in by_rank:
        index, count = found["part"]
        for name in STACKS:
            own = found["gradients"][f"experts.{name}"]
            if name == "fc2_bias" and index > 0:
                assert own is None  # the first part adds it
                continue
            pairs.append((own, _half(name, given[f"grad of {name}"][found["experts"]], index, count)))
    return max(float((a - b).abs().max()) for a, b in pairs)


@pytest.mark.parametrize(
    ("ranks", "ep_size", "parts"), [(1, 1, 1), (2, 2, 1), (4, 4, 1), (2, 1, 2)], ids=["1", "E2", "E4", "X2"]
)
def test_outputs_weights_and_every_gradient(ranks: int, ep_size: int, parts: int) -> None:
    given = reference()
    assert all(given[f"grad of {name}"].any() for name in (*ROUTER, *STACKS))
    by_rank = run_ranks(_on_rank, ranks, given, ep_size, parts, None)
    assert largest_difference(given, by_rank) < 1e-12


def _with_activation(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Any], None]:
    """Let experts compute ``function`` of gate and up."""

    def change(layer: Any) -> None:
        layer.experts.activation = lambda hidden: function(*hidden.chunk(2, dim=-1))

    return change


def _glu(gate: Tensor, alpha: float = ALPHA) -> Tensor:
    return gate * torch.sigmoid(alpha * gate)


def _right(gate: Tensor, up: Tensor) -> Tensor:
    return (up.clamp(-LIMIT, LIMIT) + 1) * _glu(gate.clamp(max=LIMIT))


def _every_part_adds_the_second_bias(layer: Any) -> None:
    layer.experts.part = (0, 2)


def _without_router_bias(layer: Any) -> None:
    layer.router.bias = None


ACTIVATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "as it is": _right,
    "up is not clamped": lambda gate, up: (up + 1) * _glu(gate.clamp(max=LIMIT)),
    "gate is not clamped": lambda gate, up: (up.clamp(-LIMIT, LIMIT) + 1) * _glu(gate),
    "gate is clamped from below": lambda gate, up: _right(gate.clamp(min=-LIMIT), up),
    "no 1 is added": lambda gate, up: up.clamp(-LIMIT, LIMIT) * _glu(gate.clamp(max=LIMIT)),
    "alpha is 1": lambda gate, up: (up.clamp(-LIMIT, LIMIT) + 1) * _glu(gate.clamp(max=LIMIT), 1.0),
    "up comes first": lambda gate, up: _right(up, gate),
}


@pytest.mark.parametrize("wrong", ACTIVATIONS)
def test_a_wrong_activation_is_seen(wrong: str) -> None:
    given = reference()
    found = _on_rank(0, given, 1, 1, _with_activation(ACTIVATIONS[wrong]))
    difference = float((found["y"] - given["y"]).abs().max())
    assert difference < 1e-12 if wrong == "as it is" else difference > 1e-2


def test_a_second_bias_of_every_part_is_seen() -> None:
    given = reference()
    by_rank = run_ranks(_on_rank, 2, given, 1, 2, _every_part_adds_the_second_bias)
    assert float((torch.cat([found["y"] for found in by_rank]) - given["y"]).abs().max()) > 1e-2


def test_a_missing_router_bias_is_seen() -> None:
    given = reference()
    found = _on_rank(0, given, 1, 1, _without_router_bias)
    assert float((found["y"] - given["y"]).abs().max()) > 1e-2


def test_alpha_is_that_of_gpt_oss_by_default() -> None:
    from transformers import GptOssConfig

    from fairseq_moe.flags.blocks import BlocksConfig

    theirs = GptOssConfig()
    ours: Any = BlocksConfig(gated_ffn=True, swiglu_limit=theirs.swiglu_limit).gated_activation()
    assert (ours.alpha, ours.limit) == (theirs.swiglu_alpha, theirs.swiglu_limit)


def test_the_published_model_has_as_many_parameters() -> None:
    from transformers import GptOssConfig, GptOssForCausalLM

    from fairseq_moe.planner.flops import active_parameters
    from fairseq_moe.planner.parameters import model_parts
    from tests.helpers.planned import build_on_meta, parse_flags, shape_from
    from tests.helpers.presets import WordIds

    config = GptOssConfig(num_hidden_layers=24, num_local_experts=32)  # gpt-oss-20b
    with torch.device("meta"):
        theirs = GptOssForCausalLM(config)
    words = WordIds(config.vocab_size)
    training = ("--criterion", "moe_cross_entropy", "--tokens-per-sample", 16, "--batch-size", 1)
    args = parse_flags(["--task", "dummy_lm", *training, "--arch", "gpt_oss_20b"])
    ours, shape = build_on_meta(args, words), shape_from(args, words)
    total = sum(entry.numel for part in model_parts(shape) for entry in part.entries)
    assert total == theirs.num_parameters() == 20_914_757_184
    assert total == ours.decoder.size.total
    assert active_parameters(shape, total) == ours.decoder.size.active
