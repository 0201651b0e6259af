"""The presets are the published models: every parameter counted on the meta device, and which a token passes."""

import pytest
import torch
from fairseq.models import ARCH_MODEL_REGISTRY
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from fairseq_moe.flags.blocks import BlocksConfig
from fairseq_moe.flags.blocks_checks import block_problems
from fairseq_moe.flags.moe import MoEConfig
from fairseq_moe.models.moe_transformer_lm import MoETransformerLanguageModel
from fairseq_moe.models.presets import PRESETS
from fairseq_moe.models.sizes import ModelSize
from tests.helpers.presets import WordIds, build_model, parse
from tests.helpers.ranks import REPOSITORY

# Billions: a token's parameters with and without the input embedding.
ACTIVE = {
    "mixtral_8x2b": (2.04, 1.97),
    "mixtral_8x7b": (12.88, 12.75),
    "mixtral_8x22b": (39.16, 38.96),
    "deepseek_v2": (21.38, 20.85),
    "deepseek_v2_lite": (2.66, 2.45),
    "deepseek_v3": (37.55, 36.63),
    "qwen2_57b_a14b": (14.25, 13.71),
    "olmoe_1b_7b": (1.28, 1.18),
    "qwen3_30b_a3b": (3.35, 3.04),
    "qwen3_235b_a22b": (22.19, 21.57),
    "gpt_oss_20b": (4.19, 3.61),
    "gpt_oss_120b": (5.71, 5.13),
    # The makers say 32, 12, 3, 14, 10 and 32 billion.
    "glm_4_5": (33.63, 32.86),
    "glm_4_5_air": (13.42, 12.80),
    "glm_4_7_flash": (3.90, 3.58),
    "dots_llm1": (14.02, 13.39),
    "minimax_m2": (11.03, 10.42),
    "kimi_k2": (32.86, 31.69),
    "granite_1b_a400m": (0.43, 0.43),
    "granite_3b_a800m": (0.88, 0.88),
    "hunyuan_a13b": (12.747, 12.747),
    "ernie_45_21b_a3b": (3.35, 3.35),
    "ernie_45_300b_a47b": (47.08, 47.08),
}


def size_of(name: str, *flags: str) -> ModelSize:
    with torch.device("meta"):
        model = build_model(parse(name, flags), WordIds(PRESETS[name].vocab_size))
    assert all(parameter.is_meta for parameter in model.parameters())
    size: ModelSize = model.decoder.size
    return size


@pytest.mark.parametrize("name", PRESETS)
def test_counts(name: str) -> None:
    size = size_of(name)
    assert size.total == PRESETS[name].num_parameters
    assert size.mtp == 0
    found = (size.active / 1e9, size.active_without_embedding / 1e9)
    assert found == pytest.approx(ACTIVE[name], abs=0.006)


def test_a_missing_gate_is_noticed() -> None:
    # Qwen2's shared expert has one in each layer.
    args = parse("qwen2_57b_a14b")
    args.moe_shared_expert_gate = False
    with torch.device("meta"):
        model = build_model(args, WordIds(PRESETS["qwen2_57b_a14b"].vocab_size))
    assert PRESETS["qwen2_57b_a14b"].num_parameters - model.decoder.size.total == 28 * 3584


def test_multi_token_prediction_of_v3() -> None:
    size = size_of("deepseek_v3", "--mtp-layers", "1")
    assert size.total == PRESETS["deepseek_v3"].num_parameters
    assert size.mtp + 256 == 11_610_068_224  # with the bias of its router, a buffer
    assert "11,610,067,968 for multi-token prediction" in str(size)


def test_tied_embedding_counts_once_and_is_active() -> None:
    tied = size_of("olmoe_1b_7b", "--share-decoder-input-output-embed")
    assert tied.total == PRESETS["olmoe_1b_7b"].num_parameters - 50_304 * 2048
    assert tied.active == tied.active_without_embedding


@pytest.mark.parametrize("name", PRESETS)
def test_for_hydra_too(name: str) -> None:
    node = OmegaConf.to_container(ConfigStore.instance().load(f"model/{name}.yaml").node, resolve=False)
    assert node["_name"] == "transformer_lm" and ARCH_MODEL_REGISTRY[name] is MoETransformerLanguageModel
    args = parse(name)
    own = {key: value for key, value in node.items() if not str(value).startswith("${")}
    assert BlocksConfig.from_args(own) == BlocksConfig.from_args(args)
    given, by_arch = MoEConfig.from_args(own), MoEConfig.from_args(args)
    assert given.megatron == by_arch.megatron and given.decoder_layers == by_arch.decoder_layers
    assert block_problems(own) == []
    for key in (
        "decoder_embed_dim",
        "decoder_output_dim",
        "decoder_attention_heads",
        "no_scale_embedding",
        "dropout",
    ):
        assert own[key] == getattr(args, key)


@pytest.mark.parametrize("name", PRESETS)
def test_documented(name: str) -> None:
    preset, text = PRESETS[name], (REPOSITORY / "docs" / "blocks.md").read_text()
    per_token = f"{ACTIVE[name][0] + 1e-9:.1f}"
    assert f"| `{name}` | {preset.num_parameters:,} | {per_token} B | {preset.vocab_size:,} |" in text


def test_a_flag_given_by_hand_counts() -> None:
    args = parse("deepseek_v3", ["--decoder-layers", "5", "--init-std", "0.006", "--num-experts", "64"])
    assert args.moe_layer_freq == "([0]*3+[1]*2)" and args.init_std == 0.006
    assert MoEConfig.from_args(args).num_experts == 64
