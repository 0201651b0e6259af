"""Norm, rotary positions and both kinds of attention against transformers' classes: outputs and gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    GptOssConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3
from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss
from transformers.models.olmoe import modeling_olmoe as olmoe
from transformers.models.qwen2_moe import modeling_qwen2_moe as qwen2
from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen3

from fairseq_moe.modules.blocks.attend import Cache
from fairseq_moe.modules.blocks.grouped import GroupedAttention, GroupedAttentionConfig
from fairseq_moe.modules.blocks.latent import LatentAttention, LatentAttentionConfig
from fairseq_moe.modules.blocks.norm import RMSNorm
from fairseq_moe.modules.blocks.rope import Rotary, RotaryConfig, YarnConfig, frequencies

B, S, D = 2, 40, 32
WINDOW = 5
TOLERANCE = 1e-5
YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 40.0,
    "original_max_position_embeddings": 32,  # fewer than S
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 0.5,
}
OUR_YARN = YarnConfig(factor=40.0, original_max_positions=32, mscale=0.707, mscale_all_dim=0.5)
NAMES = {"o_proj": "out_proj", "kv_a_proj_with_mqa": "kv_a_proj", "layernorm": "norm"}


def our_name(name: str) -> str:
    for old, new in NAMES.items():
        name = name.replace(old, new)
    return name


def randomized(module: nn.Module) -> nn.Module:
    """Norms and biases as well: ones and zeros would hide mistakes."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(mean=1.0 if parameter.dim() == 1 else 0.0, std=0.3)
    return module.eval()


def mask_of(theirs: Any) -> Tensor:
    """The mask that transformers makes for an attention: causal, in its window if it has one."""
    window = getattr(theirs, "sliding_window", None)
    rule = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    visible = rule(0, 0, torch.arange(S).unsqueeze(-1), torch.arange(S))
    return torch.zeros(S, S).masked_fill(~visible, float("-inf"))[None, None]


def grouped(name: str) -> tuple[nn.Module, nn.Module, GroupedAttention]:
    """transformers' attention, its rotary embedding, and ours."""
    common: dict[str, Any] = {
        "hidden_size": D,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attn_implementation": "eager",
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    }
    shape: dict[str, Any] = {"model_dim": D, "num_heads": 4, "num_kv_heads": 2, "norm_eps": 1e-4}
    rotary = RotaryConfig(theta=1e6)
    if name == "qwen2":
        config = Qwen2MoeConfig(**common)
        theirs, table = qwen2.Qwen2MoeAttention(config, 0), qwen2.Qwen2MoeRotaryEmbedding(config)
        shape |= {"head_dim": 8, "bias": "qkv"}
    elif name in ("qwen3", "qwen3_yarn"):
        config = Qwen3MoeConfig(**common, head_dim=12, rms_norm_eps=1e-4)
        if name == "qwen3_yarn":
            plain = {"mscale": None, "mscale_all_dim": None}
            config.rope_parameters = {**YARN, **plain}
            rotary = RotaryConfig(yarn=YarnConfig(factor=40.0, original_max_positions=32))
        theirs, table = qwen3.Qwen3MoeAttention(config, 0), qwen3.Qwen3MoeRotaryEmbedding(config)
        shape |= {"head_dim": 12, "qk_norm": "head"}
    elif name in ("gpt_oss", "gpt_oss_window"):
        yarn = {**YARN, "mscale": None, "mscale_all_dim": None, "truncate": False}
        config = GptOssConfig(
            **common | {"rope_parameters": yarn}, head_dim=12, sliding_window=WINDOW, num_hidden_layers=2
        )
        layer = 0 if name == "gpt_oss_window" else 1
        theirs, table = gpt_oss.GptOssAttention(config, layer), gpt_oss.GptOssRotaryEmbedding(config)
        rotary = RotaryConfig(yarn=YarnConfig(factor=40.0, original_max_positions=32, truncate=False))
        shape |= {"head_dim": 12, "bias": "all", "sinks": True, "window": theirs.sliding_window}
    else:
        config = OlmoeConfig(**common, clip_qkv=0.7, rms_norm_eps=1e-4, attention_bias=True)
        theirs, table = olmoe.OlmoeAttention(config, 0), olmoe.OlmoeRotaryEmbedding(config)
        shape |= {"head_dim": 8, "qk_norm": "full", "clip": 0.7, "bias": "all"}
    ours = GroupedAttention(GroupedAttentionConfig(**shape), Rotary(rotary, shape["head_dim"]))
    return theirs, table, ours


def latent(version: int, *, q_rank: int | None, interleaved: bool = True) -> tuple[Any, Any, LatentAttention]:
    shape: dict[str, Any] = {
        "hidden_size": D,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": q_rank,
        "kv_lora_rank": 20,
        "qk_nope_head_dim": 12,
        "qk_rope_head_dim": 8,
        "v_head_dim": 10,
        "attention_bias": True,
        "max_position_embeddings": 1280,
        "rope_parameters": YARN,
        "attn_implementation": "eager",
    }
    if version == 2:
        theirs: Any = v2.DeepseekV2Attention(DeepseekV2Config(**shape), 0)
        table: Any = v2.DeepseekV2RotaryEmbedding(DeepseekV2Config(**shape))
    else:
        config = DeepseekV3Config(**shape, rope_interleave=interleaved)
        theirs, table = v3.DeepseekV3Attention(config, 0), v3.DeepseekV3RotaryEmbedding(config)
    ours = LatentAttention(
        LatentAttentionConfig(
            model_dim=D,
            num_heads=4,
            kv_rank=20,
            q_rank=q_rank,
            nope_dim=12,
            rope_dim=8,
            value_dim=10,
            bias=True,
        ),
        Rotary(RotaryConfig(interleaved=interleaved, yarn=OUR_YARN), 8),
    )
    return theirs, table, ours


CASES = {
    "qwen2": lambda: grouped("qwen2"),
    "qwen3": lambda: grouped("qwen3"),
    "qwen3_yarn": lambda: grouped("qwen3_yarn"),
    "olmoe": lambda: grouped("olmoe"),
    "gpt_oss": lambda: grouped("gpt_oss"),
    "gpt_oss_window": lambda: grouped("gpt_oss_window"),
    "v2": lambda: latent(2, q_rank=16),
    "v2_lite": lambda: latent(2, q_rank=None),
    "v3": lambda: latent(3, q_rank=16),
    "v3_half": lambda: latent(3, q_rank=16, interleaved=False),
}


def pair(name: str) -> tuple[nn.Module, nn.Module, Any]:
    theirs, table, ours = CASES[name]()
    randomized(theirs)
    ours.load_state_dict({our_name(key): value for key, value in theirs.state_dict().items()})
    return theirs, table, ours.eval()


def largest_difference(name: str, ours: Any, theirs: nn.Module, table: nn.Module) -> float:
    """Of outputs, the input's gradient and every parameter's."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(B, S, D, generator=generator)
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    positions = table(x, torch.arange(S).expand(B, -1))
    expected = theirs(inputs[0], position_embeddings=positions, attention_mask=mask_of(theirs))[0]
    found = ours(inputs[1])
    cotangent = torch.randn(B, S, D, generator=generator)
    expected.backward(cotangent)
    found.backward(cotangent)
    gradients = {our_name(key): p.grad for key, p in theirs.named_parameters()}
    pairs = [(found, expected), (inputs[1].grad, inputs[0].grad)]
    pairs += [(p.grad, gradients[key]) for key, p in ours.named_parameters()]
    return max(float((a - b).detach().abs().max() / b.detach().abs().max()) for a, b in pairs)


@pytest.mark.parametrize("name", CASES)
def test_attention(name: str) -> None:
    theirs, table, ours = pair(name)
    assert largest_difference(name, ours, theirs, table) < TOLERANCE


def set_config(attention: Any, **values: Any) -> None:
    for key, value in values.items():
        object.__setattr__(attention.config, key, value)


MUTANTS = {
    "kv heads are tiled": ("qwen2", lambda a: setattr(a, "k_proj", _Reordered(a.k_proj))),
    "other theta": ("qwen3", lambda a: setattr(a, "rotary", Rotary(RotaryConfig(theta=1e4), 12))),
    "no stretching": ("qwen3_yarn", lambda a: setattr(a, "rotary", Rotary(RotaryConfig(), 12))),
    "norm over heads": ("olmoe", lambda a: set_config(a, qk_norm="none")),
    "no sinks": ("gpt_oss", lambda a: setattr(a, "sinks", None)),
    "a window of one less": ("gpt_oss_window", lambda a: set_config(a, window=WINDOW - 1)),
    "a window of one more": ("gpt_oss_window", lambda a: set_config(a, window=WINDOW + 1)),
    "no window": ("gpt_oss_window", lambda a: set_config(a, window=None)),
    "bounds of whole pairs": (
        "gpt_oss",
        lambda a: setattr(
            a,
            "rotary",
            Rotary(RotaryConfig(yarn=YarnConfig(factor=40.0, original_max_positions=32)), 12),
        ),
    ),
    "no clipping": ("olmoe", lambda a: set_config(a, clip=None)),
    "half form": ("v2", lambda a: setattr(a, "rotary", Rotary(RotaryConfig(yarn=OUR_YARN), 8))),
    "scale without mscale": ("v3", lambda a: setattr(a, "scale", 20**-0.5)),
    "interleaved form": (
        "v3_half",
        lambda a: setattr(a, "rotary", Rotary(RotaryConfig(yarn=OUR_YARN, interleaved=True), 8)),
    ),
}


class _Reordered(nn.Module):
    """Key heads in the other order, as if query head h used key head h mod G."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.linear(x).unflatten(-1, (2, -1)).flip(-2).flatten(-2)
        return output


@pytest.mark.parametrize("mutant", MUTANTS)
def test_wrong_rules_are_seen(mutant: str) -> None:
    name, change = MUTANTS[mutant]
    theirs, table, ours = pair(name)
    x = torch.randn(B, S, D, generator=torch.Generator().manual_seed(2))
    expected = theirs(
        x, position_embeddings=table(x, torch.arange(S).expand(B, -1)), attention_mask=mask_of(theirs)
    )[0]
    torch.testing.assert_close(ours(x), expected, atol=1e-4, rtol=0)
    change(ours)
    assert float((ours(x) - expected).detach().abs().max()) > 1e-3


@pytest.mark.parametrize("name", CASES)
def test_token_by_token_equals_at_once(name: str) -> None:
    _, _, ours = pair(name)
    x = torch.randn(B, S, D)
    padding = torch.zeros(B, S, dtype=torch.bool)
    padding[1, :3] = True
    cache: Cache = {}
    steps = [ours(x[:, i : i + 1], cache=cache, padding_BT=padding[:, : i + 1]) for i in range(7)]
    steps.append(ours(x[:, 7:], cache=cache, padding_BT=padding))
    torch.testing.assert_close(torch.cat(steps, 1), ours(x, padding_BT=padding), atol=1e-5, rtol=1e-5)
    window = getattr(ours.config, "window", None)
    kept = sum(value.numel() for value in cache.values()) / (B * (S if window is None else window - 1))
    if isinstance(ours, LatentAttention):
        assert set(cache) == {"latent", "rope_key"} and kept == 20 + 8
    else:
        assert kept == 2 * 2 * ours.config.head_dim


@pytest.mark.parametrize("name", ["qwen3", "v3"])
def test_padding_is_not_seen_and_all_padding_is_finite(name: str) -> None:
    _, _, ours = pair(name)
    x = torch.randn(B, S, D, requires_grad=True)
    padding = torch.zeros(B, S, dtype=torch.bool)
    padding[0, :5] = True
    padding[1] = True
    y = ours(x, padding_BT=padding)
    y.sum().backward()
    assert torch.isfinite(y).all() and x.grad is not None and torch.isfinite(x.grad).all()
    torch.testing.assert_close(y[0, 5:], ours(x[:1, 5:])[0], atol=1e-4, rtol=1e-4)  # positions are relative


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norm(dtype: torch.dtype) -> None:
    theirs, ours = v3.DeepseekV3RMSNorm(D, eps=1e-3).to(dtype), RMSNorm(D, eps=1e-3).to(dtype)
    randomized(theirs)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(S, D).to(dtype)
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    results = [theirs(inputs[0]), ours(inputs[1])]
    for result in results:
        result.backward(torch.linspace(-1, 1, S * D).view(S, D).to(dtype))
    pairs = [results, [x.grad for x in inputs], [theirs.weight.grad, ours.weight.grad]]
    for expected, found in pairs:
        tolerance = 1e-5 if dtype is torch.float32 else 0.03
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    ("mscale", "mscale_all_dim", "attention_factor"),
    [
        (0.707, 0.707, None),
        (1.0, 1.0, None),
        (1.0, 0.5, None),
        (None, None, None),
        (None, None, 1.3),
        (1, 0, None),
    ],
)
@pytest.mark.parametrize("truncate", [True, False])
@pytest.mark.parametrize(("factor", "original"), [(40.0, 4096), (4.0, 64), (0.5, 32), (32.0, 16)])
def test_yarn(
    mscale: float | None,
    mscale_all_dim: float | None,
    attention_factor: float | None,
    factor: float,
    original: int,
    truncate: bool,
) -> None:
    given = {"mscale": mscale, "mscale_all_dim": mscale_all_dim, "attention_factor": attention_factor}
    config = DeepseekV3Config(
        qk_rope_head_dim=64,
        max_position_embeddings=int(original * max(factor, 1)),
        rope_parameters={
            **YARN,
            "factor": factor,
            "original_max_position_embeddings": original,
            "truncate": truncate,
        }
        | given,
    )
    theirs = v3.DeepseekV3RotaryEmbedding(config)
    yarn = YarnConfig(factor=factor, original_max_positions=original, truncate=truncate, **given)
    found = frequencies(RotaryConfig(yarn=yarn), 64)
    torch.testing.assert_close(found, theirs.inv_freq, rtol=1e-6, atol=0)
    assert yarn.magnitude() == pytest.approx(theirs.attention_scaling)
    scaling = v3.yarn_apply_mscale(config.rope_parameters, 1.0)
    assert yarn.score_scale() == pytest.approx(scaling)


def test_published_score_scales() -> None:
    for mscale, expected in ((0.707, 1.59), (1.0, 1.87)):
        yarn = YarnConfig(factor=40, original_max_positions=4096, mscale=mscale, mscale_all_dim=mscale)
        assert yarn.score_scale() == pytest.approx(expected, abs=0.005) and yarn.magnitude() == 1.0


@pytest.mark.parametrize("interleaved", [False, True])
def test_partial_rotary_turns_the_beginning(interleaved: bool) -> None:
    whole = Rotary(RotaryConfig(interleaved=interleaved), 8)
    part = Rotary(RotaryConfig(interleaved=interleaved, fraction=0.5), 16)
    x = torch.randn(2, 3, 5, 16)
    torch.testing.assert_close(part(x), torch.cat([whole(x[..., :8]), x[..., 8:]], dim=-1))
    assert torch.equal(part(x)[..., 0, :], x[..., 0, :])  # position 0 does not turn
    torch.testing.assert_close(part(x)[..., 3:, :], part(x[..., 3:, :], start=3))


def test_half_precision_heads_turn_in_float32() -> None:
    rotary, x = Rotary(RotaryConfig(), 8), torch.randn(1, 2, 300, 8)
    exact = rotary(x.bfloat16().float())
    assert torch.equal(rotary(x.bfloat16()), exact.bfloat16())
