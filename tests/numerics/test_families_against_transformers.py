"""Whole models of every family against transformers: logits, chosen experts, weights and gradients in float32."""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairseq_moe.modules import Router
from fairseq_moe.modules.blocks.grouped import GroupedAttention
from fairseq_moe.modules.blocks.latent import LatentAttention
from fairseq_moe.modules.blocks.norm import RMSNorm
from fairseq_moe.modules.blocks.rope import Rotary
from fairseq_moe.modules.routing.scores import GroupScore
from tests.helpers.families import FAMILIES, VOCABULARY, build_pair, our_state

B, S = 2, 48
TOLERANCE = 1e-4  # expected: 1e-5


def words() -> Tensor:
    """Ids 0 to 3 included, which fairseq's own dictionaries keep for themselves; later than YaRN's 16 positions."""
    ids = torch.randint(0, VOCABULARY, (B, S), generator=torch.Generator().manual_seed(6))
    ids[0, :6] = torch.tensor([1, 0, 2, 3, 1, 1])
    return ids


@contextmanager
def recorded(model: nn.Module, wanted: Callable[[nn.Module], bool]) -> Any:
    """The outputs of some parts of a model, in order."""
    outputs: list[Any] = []
    handles = [
        part.register_forward_hook(lambda module, args, output: outputs.append(output))
        for part in model.modules()
        if wanted(part)
    ]
    yield outputs
    for handle in handles:
        handle.remove()


def our_logits(ours: Any) -> Tensor:
    return ours(words())[0]


def dense_weights(ids_TK: Tensor, weights_TK: Tensor, num_experts: int) -> Tensor:
    """float (T, E), whatever the order of the choices."""
    return torch.zeros(len(ids_TK), num_experts).scatter(1, ids_TK, weights_TK.float())


@pytest.mark.parametrize("name", FAMILIES)
class TestFamilies:
    def test_logits_choices_and_weights(self, name: str) -> None:
        theirs, ours = build_pair(name)
        with (
            torch.no_grad(),
            recorded(
                theirs,
                lambda part: type(part).__name__.endswith(("TopKRouter", "TopkRouter", "HunYuanMoEV1Gate")),
            ) as their_choices,
            recorded(ours, lambda part: isinstance(part, Router)) as our_choices,
        ):
            expected, found = theirs(words()).logits, our_logits(ours)
        assert found.shape == expected.shape == (B, S, VOCABULARY)
        assert float(expected.abs().max()) > 1  # not so small that anything would do
        assert float((found - expected).abs().max()) < TOLERANCE * float(expected.abs().max())
        assert len(their_choices) == len(our_choices) == len(FAMILIES[name].moe_layers)
        for (_, weights, ids), routed in zip(their_choices, our_choices, strict=True):
            num_experts = routed.gates_TE.shape[1]
            torch.testing.assert_close(
                dense_weights(routed.decision.expert_ids_TK, routed.weights_TK, num_experts),
                dense_weights(ids, weights, num_experts),
                atol=1e-5,
                rtol=1e-5,
            )
            assert torch.equal(routed.decision.expert_ids_TK.sort(-1).values, ids.sort(-1).values)

    def test_every_gradient(self, name: str) -> None:
        theirs, ours = build_pair(name)
        targets = words().roll(-1, dims=1)
        for logits in (theirs(words()).logits, our_logits(ours)):
            F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
        grads = {key: p.grad for key, p in theirs.named_parameters() if p.requires_grad}
        expected = our_state(grads, tied=theirs.config.tie_word_embeddings)
        found = {key: p.grad for key, p in ours.named_parameters()}
        assert expected.keys() == found.keys()
        for key, gradient in expected.items():
            scale = float(gradient.abs().max())
            assert scale > 0, key
            assert float((found[key] - gradient).abs().max()) < 1e-4 * scale, key

    def test_token_by_token(self, name: str) -> None:
        _, ours = build_pair(name)
        state: dict[str, Any] = {}
        ids = words()
        with torch.no_grad():
            expected = our_logits(ours)
            steps = [ours.decoder(ids[:, : i + 1], incremental_state=state)[0] for i in range(6)]
            ours.decoder.reorder_incremental_state_scripting(state, torch.tensor([1, 0]))
            ids = ids.flip(0)
            steps += [ours.decoder(ids[:, : i + 1], incremental_state=state)[0].flip(0) for i in range(6, S)]
        torch.testing.assert_close(torch.cat(steps, 1), expected, atol=1e-4, rtol=1e-4)

    def test_checkpointed_activations(self, name: str) -> None:
        gradients = []
        for flags in ("", "--checkpoint-activations"):
            _, ours = build_pair(name, flags)
            ours.train()
            our_logits(ours).logsumexp(-1).sum().backward()
            gradients.append({key: p.grad for key, p in ours.named_parameters()})
        for key, gradient in gradients[0].items():
            assert gradient is not None and torch.equal(gradient, gradients[1][key]), key


def change_rule(**values: Any) -> Callable[[Any], None]:
    def change(ours: Any) -> None:
        for router in ours.decoder.routers():
            router.rule.config = replace(
                router.rule.config, score=replace(router.rule.config.score, **values)
            )

    return change


def change_rotary(**values: Any) -> Callable[[Any], None]:
    def change(ours: Any) -> None:
        for part in ours.modules():
            if isinstance(part, GroupedAttention | LatentAttention):
                old = part.rotary
                part.rotary = Rotary(replace(old.config, **values), round(old.dim / old.config.fraction))

    return change


def change_beta_fast(ours: Any) -> None:
    for part in ours.modules():
        if isinstance(part, LatentAttention):
            config = part.rotary.config
            part.rotary = Rotary(replace(config, yarn=replace(config.yarn, beta_fast=32.0)), part.rotary.dim)


def drop_bias(ours: Any) -> None:
    for router in ours.decoder.routers():
        router.expert_bias.zero_()


def biased_weights(ours: Any) -> None:
    for router in ours.decoder.routers():
        plain = router.rule._weights
        bias_E = router.expert_bias
        router.rule._weights = lambda logits, ids, plain=plain, bias_E=bias_E: plain(
            torch.logit((logits.sigmoid() + bias_E).clamp(1e-6, 1 - 1e-6)), ids
        )


def unscaled_scores(ours: Any) -> None:
    for part in ours.modules():
        if isinstance(part, LatentAttention):
            part.scale = 20**-0.5


def open_gates(ours: Any) -> None:
    for part in ours.modules():
        if getattr(part, "gate", None) is not None:
            part.gate = None


def drop_biases(ours: Any) -> None:
    for part in ours.modules():
        if isinstance(part, GroupedAttention):
            part.k_proj.bias = part.v_proj.bias = None


def no_clipping(ours: Any) -> None:
    for part in ours.modules():
        if isinstance(part, GroupedAttention):
            part.config = replace(part.config, clip=None)


def other_eps(ours: Any) -> None:
    for part in ours.modules():
        if isinstance(part, RMSNorm):
            part.eps = 1e-2


def no_head_norm(ours: Any) -> None:
    for part in ours.modules():
        if isinstance(part, GroupedAttention):
            part.config = replace(part.config, qk_norm="none")


def change_attention(**values: Any) -> Callable[[Any], None]:
    def change(ours: Any) -> None:
        for part in ours.modules():
            if isinstance(part, GroupedAttention):
                part.config = replace(part.config, **values)

    return change


def windows_everywhere(ours: Any) -> None:
    widths = [layer.self_attn.config.window for layer in ours.decoder.layers]
    (width,) = {width for width in widths if width is not None}
    change_attention(window=width)(ours)


def no_sinks(ours: Any) -> None:
    for part in ours.modules():
        if isinstance(part, GroupedAttention):
            part.sinks = None


def change_activation(**values: Any) -> Callable[[Any], None]:
    def change(ours: Any) -> None:
        for layer in ours.decoder.layers:
            experts = layer.moe_layer.experts
            experts.activation = replace(experts.activation, **values)

    return change


def no_router_bias(ours: Any) -> None:
    for router in ours.decoder.routers():
        router.bias = None


def truncated(ours: Any) -> None:
    for part in ours.modules():
        if isinstance(part, GroupedAttention):
            yarn = replace(part.rotary.config.yarn, truncate=True)
            part.rotary = Rotary(replace(part.rotary.config, yarn=yarn), part.rotary.dim)


def norm_before_rope(ours: Any) -> None:
    for part in ours.modules():
        if isinstance(part, GroupedAttention):
            part.config = replace(part.config, norm_after_rope=False)


def usual_scores(ours: Any) -> None:
    for part in ours.modules():
        if isinstance(part, GroupedAttention):
            part.config = replace(part.config, scale=None)


def plain_embedding(ours: Any) -> None:
    ours.decoder.embed_scale = 1.0


def plain_residuals(ours: Any) -> None:
    for layer in ours.decoder.layers:
        layer.multiplier = 1.0


def plain_logits(ours: Any) -> None:
    ours.decoder.blocks = replace(ours.decoder.blocks, logits_scaling=None)


def mask_id_one(ours: Any) -> None:
    """What fairseq's own dictionary would do to the token 1."""
    ours.decoder.padding_idx = 1


WRONG_RULES: dict[str, tuple[str, Callable[[Any], None]]] = {
    "gpt-oss: no sinks": ("gpt_oss", no_sinks),
    "gpt-oss: window off by one": ("gpt_oss", change_attention(window=7)),
    "gpt-oss: window in all layers": ("gpt_oss", windows_everywhere),
    "gpt-oss: no limit": ("gpt_oss", change_activation(limit=1e3)),
    "gpt-oss: alpha 1": ("gpt_oss", change_activation(alpha=1.0)),
    "gpt-oss: no bias of logits": ("gpt_oss", no_router_bias),
    "gpt-oss: truncated YaRN": ("gpt_oss", truncated),
    "mixtral: no window": ("mixtral_window", change_attention(window=None)),
    "qwen2: window in all layers": ("qwen2_window", windows_everywhere),
    "mixtral: not renormalised": ("mixtral", change_rule(pre_softmax=True)),
    "mixtral: theta 10000": ("mixtral", change_rotary(theta=1e4)),
    "mixtral: token 1 is padding": ("mixtral", mask_id_one),
    "v2: group score of the best two": ("deepseek_v2", change_rule(group_score=GroupScore.BEST_TWO)),
    "v2: no groups": ("deepseek_v2", change_rule(num_groups=None, group_topk=None)),
    "v2: not scaled": ("deepseek_v2", change_rule(scaling_factor=1.0)),
    "v2: no mscale in scores": ("deepseek_v2", unscaled_scores),
    "v2 lite: renormalised": ("deepseek_v2_lite", change_rule(pre_softmax=False)),
    "v2 lite: half form": ("deepseek_v2_lite", change_rotary(interleaved=False)),
    "v2 lite: no YaRN": ("deepseek_v2_lite", change_rotary(yarn=None)),
    "v3: group score of the maximum": ("deepseek_v3", change_rule(group_score=GroupScore.MAXIMUM)),
    "v3: no bias in the choice": ("deepseek_v3", drop_bias),
    "v3: bias in the weights": ("deepseek_v3", biased_weights),
    "qwen2: renormalised": ("qwen2", change_rule(pre_softmax=False)),
    "qwen2: no gate": ("qwen2", open_gates),
    "qwen2: no biases": ("qwen2", drop_biases),
    "olmoe: renormalised": ("olmoe", change_rule(pre_softmax=False)),
    "olmoe: no clipping": ("olmoe", no_clipping),
    "olmoe: other eps": ("olmoe", other_eps),
    "qwen3: not renormalised": ("qwen3", change_rule(pre_softmax=True)),
    "qwen3: no norm of heads": ("qwen3", no_head_norm),
    "glm: heads turn whole": ("glm", change_rotary(fraction=1.0)),
    "glm: no biases": ("glm", drop_biases),
    "glm: no norm of heads": ("glm", no_head_norm),
    "glm: not scaled": ("glm", change_rule(scaling_factor=1.0)),
    "glm lite: half form": ("glm_lite", change_rotary(interleaved=False)),
    "glm lite: bias in the weights": ("glm_lite", biased_weights),
    "dots: no bias in the choice": ("dots", drop_bias),
    "dots: heads turn in part": ("dots", change_rotary(fraction=0.5)),
    "minimax: heads turn whole": ("minimax", change_rotary(fraction=1.0)),
    "minimax: no norm": ("minimax", no_head_norm),
    "kimi: YaRN between two pairs": ("kimi", change_beta_fast),
    "granite: plain embedding": ("granite", plain_embedding),
    "granite: plain residuals": ("granite", plain_residuals),
    "granite: usual scores": ("granite", usual_scores),
    "granite: plain logits": ("granite_shared", plain_logits),
    "hunyuan: norm before rope": ("hunyuan", norm_before_rope),
    "hunyuan: alpha forgotten": ("hunyuan", change_rotary(theta=1e4)),
    "ernie: choice by logits": ("ernie", change_rule(by_probability=False)),
    "ernie: half form": ("ernie", change_rotary(interleaved=False)),
}


@pytest.mark.parametrize("wrong", WRONG_RULES)
def test_wrong_rules_are_seen(wrong: str) -> None:
    name, change = WRONG_RULES[wrong]
    theirs, ours = build_pair(name)
    with torch.no_grad():
        expected = theirs(words()).logits
        change(ours)
        difference = float((our_logits(ours) - expected).abs().max())
    assert difference > 10 * TOLERANCE * float(expected.abs().max())


def test_every_family_has_a_wrong_rule() -> None:
    assert {name for name, _ in WRONG_RULES.values()} == set(FAMILIES)
