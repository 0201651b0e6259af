"""The decoder of modern blocks by itself: flags and refusals, initial weights, padding, and guessing further."""

from dataclasses import replace
from shlex import split
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fairseq.logging import metrics
from torch import Tensor, nn

from fairseq_moe.criterions import MoECrossEntropyCriterion
from fairseq_moe.criterions.nll import summed_nll
from fairseq_moe.flags.blocks import BlocksConfig
from fairseq_moe.models.embedding import WordEmbedding
from fairseq_moe.modules import Experts, Router, RouterMode, SharedExperts, TokenInfo
from fairseq_moe.modules.blocks.norm import RMSNorm
from fairseq_moe.modules.kernels.swiglu import ClampedSwiglu
from tests.helpers.presets import WordIds, build_model, parse

V, B, S = 31, 2, 12
TINY = split(
    "--decoder-layers 2 --decoder-embed-dim 32 --decoder-attention-heads 4 --decoder-ffn-embed-dim 24 "
    "--dropout 0 --attention-dropout 0 --no-scale-embedding"
)
EXPERTS = split("--num-experts 4 --moe-ffn-hidden-size 20 --moe-router-pre-softmax --moe-aux-loss-coeff 0.1")
LATENT = split(
    "--kv-lora-rank 16 --qk-nope-head-dim 8 --qk-rope-head-dim 4 --v-head-dim 6 --position-embedding rope"
)
MULTIPLIERS = split(
    "--embedding-multiplier 3 --residual-multiplier 0.7 --attention-multiplier 0.5 --logits-scaling 1.5"
)


def make(*flags: str, pad: int | None = None) -> Any:
    torch.manual_seed(0)
    return build_model(parse("transformer_lm_gpt", [*TINY, *flags]), WordIds(V, pad=pad))


def words(seed: int = 0) -> Tensor:
    return torch.randint(2, V, (B, S), generator=torch.Generator().manual_seed(seed))


class TestCompositions:
    @pytest.mark.parametrize(
        "flags",
        [
            "--decoder-normalization rmsnorm",
            "--position-embedding rope",
            "--position-embedding none",
            "--position-embedding rope --rotary-fraction 0.5 --decoder-kv-heads 2",
            "--gated-ffn",
            "--attention-bias qkv --qk-norm head",
            "--qk-norm full --clip-qkv 1",
            "--attention-sinks --attention-window 3 --attention-window-layers [1,0] --position-embedding rope",
            "--position-embedding rope --qk-norm head --qk-norm-after-rope",
            " ".join(MULTIPLIERS),
            " ".join(LATENT),
            " ".join([*LATENT, "--q-lora-rank", "8", "--attention-bias", "all"]),
        ],
    )
    @pytest.mark.parametrize("experts", [False, True])
    def test_trains_and_decodes(self, flags: str, experts: bool) -> None:
        model = make(*flags.split(), *(EXPERTS if experts else [])).train()
        logits, extra = model(words())
        assert logits.shape == (B, S, V) and [aux is not None for aux in extra["moe_aux"]] == [experts] * 2
        logits.logsumexp(-1).sum().backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
        model.eval()
        state: dict[str, Any] = {}
        with torch.no_grad():
            steps = [model.decoder(words()[:, : i + 1], incremental_state=state)[0] for i in range(S)]
            torch.testing.assert_close(torch.cat(steps, 1), model(words())[0], atol=1e-4, rtol=1e-4)

    def test_a_look_under_inference_mode_leaves_it_trainable(self) -> None:
        model = make("--position-embedding", "rope", "--decoder-normalization", "rmsnorm")
        with torch.inference_mode():
            model(words())
        model(words())[0].sum().backward()

    def test_no_flag_is_stock(self) -> None:
        model = make(*EXPERTS, pad=1)
        assert not model.decoder.blocks.enabled
        assert type(model.decoder.layers[0]).__name__ == "MoEDecoderLayer"

    def test_classic_attention_of_our_own_equals_stocks(self) -> None:
        # The same function: biases everywhere, one key head per query head, no positions.
        stock = make("--no-token-positional-embeddings", *EXPERTS, pad=1).eval()
        ours = make("--position-embedding", "none", "--norm-eps", "1e-5", *EXPERTS, pad=1).eval()
        ours.load_state_dict(stock.state_dict())
        with torch.no_grad():
            torch.testing.assert_close(ours(words())[0], stock(words())[0], atol=1e-5, rtol=1e-5)

    def test_initial_weights(self) -> None:
        model = make("--decoder-normalization", "rmsnorm", "--init-std", "0.1", *EXPERTS)
        for part in model.modules():
            if isinstance(part, nn.Linear | nn.Embedding | Router):
                assert float(part.weight.detach().std()) == pytest.approx(0.1, rel=0.2), part
            if isinstance(part, nn.Linear) and part.bias is not None:
                assert not part.bias.any()
            if isinstance(part, Experts):
                assert float(part.fc1_weight.detach().std()) == pytest.approx(0.1, rel=0.2)
            if isinstance(part, RMSNorm):
                assert (part.weight == 1).all()

    def test_sinks_start_normal(self) -> None:
        model = make("--attention-sinks", "--init-std", "0.1", "--decoder-attention-heads", "32")
        sinks = torch.cat([layer.self_attn.sinks.detach() for layer in model.decoder.layers])
        assert len(sinks) == 64 and float(sinks.std()) == pytest.approx(0.1, rel=0.3)
        assert abs(float(sinks.mean())) < 0.05

    def test_windows_are_those_of_the_layers_that_are_marked(self) -> None:
        flags = ("--attention-window", "3", "--decoder-layers", "4")
        for more, expected in (
            ([], [3, 3, 3, 3]),
            (["2"], [3, None, 3, None]),
            (["([0,1]*2)"], [None, 3, None, 3]),
        ):
            model = make(*flags, *(["--attention-window-layers", *more] if more else []))
            assert [layer.self_attn.config.window for layer in model.decoder.layers] == expected

    def test_biases_of_gated_networks_and_routers(self) -> None:
        router_bias = ("--num-experts", "64", "--moe-layer-freq", "[0,1]", "--moe-router-bias")
        flags = ("--gated-ffn", "--gated-ffn-bias", "--init-std", "0.1", *EXPERTS, *router_bias)
        model = make(*flags, "--moe-shared-expert-intermediate-size", "20")
        state = model.state_dict()
        dense, moe = "decoder.layers.0.", "decoder.layers.1.moe_layer."
        for fc1, fc2 in (
            (f"{dense}fc1.", f"{dense}fc2."),
            (f"{moe}shared_experts.fc1.", f"{moe}shared_experts.fc2."),
            (f"{moe}experts.fc1_", f"{moe}experts.fc2_"),
        ):
            assert state[f"{fc1}bias"].shape == state[f"{fc1}weight"].shape[:-1]
            assert state[f"{fc1}bias"].shape[-1] == 2 * state[f"{fc2}weight"].shape[-1]
            assert state[f"{fc2}bias"].shape == state[f"{fc2}weight"].shape[:-1]
            assert not state[f"{fc1}bias"].any() and not state[f"{fc2}bias"].any()
        bias = state[f"{moe}router.bias"]
        assert bias.shape == (64,) and float(bias.std()) == pytest.approx(0.1, rel=0.3)

    def test_clamped_networks(self) -> None:
        kinds = (*EXPERTS, "--moe-layer-freq", "[0,1]", "--gated-ffn")
        plain, clamped = ((*kinds, *more) for more in ((), ("--swiglu-limit", "0.5")))
        models = [make(*flags, "--moe-shared-expert-intermediate-size", "20") for flags in (plain, clamped)]
        for part in models[1].modules():
            if isinstance(part, Experts | SharedExperts):
                assert part.activation == ClampedSwiglu(alpha=1.702, limit=0.5)
        assert models[1].decoder.layers[0].activation_fn == ClampedSwiglu(alpha=1.702, limit=0.5)
        models[1].load_state_dict(models[0].state_dict())
        assert not torch.allclose(*(model.eval()(words())[0] for model in models))

    @pytest.mark.parametrize("tied", [[], ["--share-decoder-input-output-embed"]], ids=["", "tied"])
    def test_multipliers_by_hand(self, tied: list[str]) -> None:
        model = make(*MULTIPLIERS, "--position-embedding", "none", *EXPERTS, *tied).eval()
        decoder = model.decoder
        with torch.no_grad():
            found, extra = model(words())
            x = 3 * decoder.embed_tokens(words())
            for index, layer in enumerate(decoder.layers):
                attention = layer.self_attn
                attention.config = replace(attention.config, scale=None)
                attention.q_proj.weight *= 0.5 * 8**0.5  # heads of 8
                x = x + 0.7 * attention(layer.self_attn_layer_norm(x))
                y, aux = layer.moe_layer(
                    layer.final_layer_norm(x).flatten(0, 1), tokens=TokenInfo(mode=RouterMode.EVAL)
                )
                x = x + 0.7 * y.view_as(x)
                torch.testing.assert_close(extra["moe_aux"][index].losses, aux.losses)
            expected = decoder.output_projection(decoder.layer_norm(x)) / 1.5
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)

    def test_prediction_blocks_have_the_same_multipliers(self) -> None:
        model = make(*MTP, *MULTIPLIERS, "--mtp-loss-weight", "0.3", *EXPERTS).train()
        assert {layer.multiplier for layer in [*model.decoder.layers, model.decoder.mtp[1].layer]} == {0.7}
        logits = model(words())[1]["mtp_logits"]
        model.decoder.blocks = replace(model.decoder.blocks, logits_scaling=None)
        for one, other in zip(model(words())[1]["mtp_logits"], logits, strict=True):
            torch.testing.assert_close(one, 1.5 * other, atol=1e-5, rtol=1e-5)
        model.decoder.embed_scale = 1.0
        assert not torch.allclose(model(words())[1]["mtp_logits"][1], 1.5 * logits[1], atol=1e-3)

    def test_tied_head(self) -> None:
        model = make("--gated-ffn", "--share-decoder-input-output-embed")
        assert model.decoder.output_projection.weight is model.decoder.embed_tokens.weight
        state = model.state_dict()
        del state["decoder.output_projection.weight"], state["decoder.version"]  # as a converter writes
        make("--gated-ffn", "--share-decoder-input-output-embed").load_state_dict(state)

    def test_an_untied_model_from_a_converter(self) -> None:
        model, state = (
            make("--decoder-normalization", "rmsnorm"),
            make("--decoder-normalization", "rmsnorm").state_dict(),
        )
        del state["decoder.version"]
        model.load_state_dict(state)
        assert isinstance(model.decoder.layer_norm, RMSNorm)  # stock would drop it from "old" versions


class TestPadding:
    def test_all_words_are_words(self) -> None:
        model = make("--position-embedding", "rope").eval()
        ids = words()
        ids[:, :4] = torch.tensor([1, 0, 3, 2])
        with torch.no_grad():
            before = model(ids)[0]
            ids[0, 0] = 5
            assert not torch.equal(model(ids)[0][0], before[0])  # token 1 was seen
            model.decoder.padding_idx = 1
            assert not torch.allclose(model(ids)[0][1], before[1])  # and would not be if it were padding

    @pytest.mark.parametrize("pad", [V, V + 7])
    def test_padding_is_zeros_without_gradients(self, pad: int) -> None:
        model = make("--position-embedding", "rope", pad=pad)
        assert isinstance(model.decoder.embed_tokens, WordEmbedding)
        ids = words()
        ids[1, 7:] = pad
        logits = model(ids)[0]
        with torch.no_grad():
            torch.testing.assert_close(logits[1:, :7], model(ids[1:, :7])[0], atol=1e-5, rtol=1e-5)
        logits[1, 7:].sum().backward()
        assert not model.decoder.embed_tokens(ids)[1, 7:].any()

    def test_gradient_of_words(self) -> None:
        embedding = WordEmbedding(V, 4, pad=V)
        ids = torch.tensor([0, V, 3, V])
        embedding(ids).sum().backward()
        assert embedding.weight.grad is not None
        assert embedding.weight.grad.sum(-1).tolist() == [4.0 if word in (0, 3) else 0.0 for word in range(V)]

    def test_loss_of_targets_outside_the_vocabulary(self) -> None:
        logits = torch.randn(5, V, requires_grad=True)
        target = torch.tensor([3, V, 0, V, 7])
        other = logits.detach().clone().requires_grad_()
        found = summed_nll(logits * 1.0, target, ignore_index=V)
        expected = F.cross_entropy(other, target.masked_fill(target == V, -100), reduction="sum")
        found.backward()
        expected.backward()
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(logits.grad, other.grad)


MTP = ["--position-embedding", "rope", "--decoder-normalization", "rmsnorm", "--mtp-layers", "2"]


def criterion() -> MoECrossEntropyCriterion:
    task: Any = SimpleNamespace(target_dictionary=WordIds(V))
    return MoECrossEntropyCriterion(task, False, 1.0, "average", "none")


class TestFurtherTokens:
    def sample(self) -> dict[str, Any]:
        ids = words()
        target = ids.roll(-1, 1)
        target[:, -1] = V
        return {"net_input": {"src_tokens": ids}, "target": target, "ntokens": int((target != V).sum())}

    def by_hand(self, model: Any, sample: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Loss of the blocks, and the experts' losses, each averaged over the blocks."""
        decoder, ids = model.decoder, sample["net_input"]["src_tokens"]
        hidden, _ = decoder(ids, features_only=True)
        losses, expert_losses = [], []
        for index, block in enumerate(decoder.mtp):
            following = ids[:, index + 1 :]
            joined = torch.cat(
                [block.embed_norm(decoder.embed_tokens(following)), block.hidden_norm(hidden[:, :-1])], -1
            )
            layer, x = block.layer, block.proj(joined)
            x = x + layer.self_attn(layer.self_attn_layer_norm(x))
            normed = layer.final_layer_norm(x)
            if layer.moe_layer is None:
                y = layer.fc2(layer.activation_fn(layer.fc1(normed)))
            else:
                from fairseq_moe.modules import LOSSES, RouterMode, TokenInfo

                y, aux = layer.moe_layer(normed.flatten(0, 1), tokens=TokenInfo(mode=RouterMode.TRAIN))
                y = y.view_as(x)
                expert_losses.append(aux.losses[LOSSES.index("aux")])
            hidden = block.norm(x + y)
            logits = decoder.output_projection(hidden)
            losses.append(
                F.cross_entropy(
                    logits.flatten(0, 1),
                    sample["target"][:, index + 1 :].flatten(),
                    ignore_index=V,
                    reduction="sum",
                )
            )
        return torch.stack(losses).mean(), torch.stack(
            expert_losses
        ).mean() if expert_losses else torch.zeros(())

    @pytest.mark.parametrize("flags", [[], EXPERTS, ["--checkpoint-activations", *EXPERTS]], ids=str)
    def test_loss_by_hand(self, flags: list[str]) -> None:
        model = make(*MTP, "--mtp-loss-weight", "0.3", *flags).train()
        sample = self.sample()
        loss, size, log = criterion()(model, sample)
        guesses, of_experts = self.by_hand(model, sample)
        expected = 0.3 * (guesses + size * 0.1 * of_experts)
        torch.testing.assert_close(log["mtp_loss"], expected.detach(), atol=1e-4, rtol=1e-5)
        # A weight of 0.6 adds as much again.
        model.decoder.blocks = BlocksConfig.from_args({**vars(model.decoder.blocks), "mtp_loss_weight": 0.6})
        twice, _, _ = criterion()(model, sample)
        torch.testing.assert_close((twice - loss).detach(), expected.detach(), atol=1e-3, rtol=1e-5)
        loss.backward()
        assert all(p.grad is not None and p.grad.any() for p in model.decoder.mtp.parameters())

    def test_the_branchs_gates_weigh_its_experts_too(self) -> None:
        gates = ["--moe-freq", "1", "--moe-expert-count", "4"]
        model = make(*MTP, "--mtp-loss-weight", "0.3", *gates).train()

        def gradients(weight: float) -> list[Tensor]:
            model.zero_grad()
            losses = criterion()
            losses.gate_loss_weight = weight
            losses(model, self.sample())[0].backward()
            return [p.grad for name, p in model.decoder.mtp.named_parameters() if "router" in name]

        for without, with_loss in zip(gradients(0.0), gradients(1.0), strict=True):
            assert not torch.allclose(without, with_loss)

    def test_no_sample_gives_a_loss_of_0(self) -> None:
        numbers = dict.fromkeys(("sample_size", "ntokens", "mtp_loss", "loss", "inner_loss"), 0)
        with metrics.aggregate() as found:
            MoECrossEntropyCriterion.reduce_metrics([numbers])
        assert found.get_smoothed_values()["mtp_loss"] == 0

    def test_kept_and_not_computed_without_a_weight(self) -> None:
        model = make(*MTP, *EXPERTS).train()
        assert not any(p.requires_grad for p in model.decoder.mtp.parameters())
        assert any(key.startswith("decoder.mtp.1.layer.moe_layer.experts") for key in model.state_dict())
        loss, _, log = criterion()(model, self.sample())
        assert "mtp_loss" not in log
        loss.backward()
        assert all(p.grad is None for p in model.decoder.mtp.parameters())

    def test_not_in_evaluation(self) -> None:
        model = make(*MTP, "--mtp-loss-weight", "0.3").eval()
        logits, extra = model(words())
        assert "mtp_logits" not in extra and logits.shape == (B, S, V)

    def test_names(self) -> None:
        names = {
            key.split(".layer.")[0] for key in make(*MTP).state_dict() if key.startswith("decoder.mtp.0")
        }
        assert names == {
            "decoder.mtp.0",
            *(f"decoder.mtp.0.{part}.weight" for part in ("embed_norm", "hidden_norm", "norm", "proj")),
        }
