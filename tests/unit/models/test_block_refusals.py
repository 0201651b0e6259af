"""Flags of blocks that do not go together, or mean nothing, are refused: one sentence each, all at once."""

from typing import Any

import pytest

from fairseq_moe.flags.blocks_checks import block_problems

V, B, S = 31, 2, 12
BASE = {"decoder_embed_dim": 32, "decoder_attention_heads": 4, "decoder_layers": 2}
REFUSED: dict[str, dict[str, Any]] = {
    "--decoder-normalization is 'batch'": {"decoder_normalization": "batch"},
    "--position-embedding is 'alibi'": {"position_embedding": "alibi"},
    "--rope-scaling is 'linear'": {"position_embedding": "rope", "rope_scaling": "linear"},
    "--attention-bias is 'yes'": {"attention_bias": "yes"},
    "--qk-norm is 'row'": {"qk_norm": "row"},
    "--norm-eps is 0": {"norm_eps": 0.0},
    "--mtp-layers is -1": {"mtp_layers": -1},
    "--rotary-fraction is 1.5": {"position_embedding": "rope", "rotary_fraction": 1.5},
    "--rope-theta need --position-embedding rope": {"rope_theta": 1e6},
    "--rope-mscale need --rope-scaling yarn": {"position_embedding": "rope", "rope_mscale": 1.0},
    "needs --rope-scaling-factor and": {"position_embedding": "rope", "rope_scaling": "yarn"},
    "describe latent attention; give --kv-lora-rank": {"v_head_dim": 8},
    "--kv-lora-rank needs --qk-nope-head-dim": {"kv_lora_rank": 8, "position_embedding": "rope"},
    "--decoder-kv-heads is 3": {"decoder_kv_heads": 3},
    "is not a multiple of --decoder-attention-heads 5": {"gated_ffn": True, "decoder_attention_heads": 5},
    "3 values of each head turn": {"position_embedding": "rope", "decoder_head_dim": 3},
    "--qk-norm-after-rope needs --qk-norm head and": {"qk_norm": "head", "qk_norm_after_rope": True},
    "--logits-scaling is 0": {"logits_scaling": 0.0},
    "--residual-multiplier is -1": {"residual_multiplier": -1.0},
    "--mtp-loss-weight needs --mtp-layers": {"mtp_loss_weight": 0.1},
    "--swiglu-limit is -7": {"gated_ffn": True, "swiglu_limit": -7.0},
    "--swiglu-limit is nan": {"gated_ffn": True, "swiglu_limit": float("nan")},
    "--swiglu-alpha is 0": {"gated_ffn": True, "swiglu_limit": 7.0, "swiglu_alpha": 0.0},
    "--swiglu-alpha needs --swiglu-limit": {"gated_ffn": True, "swiglu_alpha": 1.5},
    "--gated-ffn-bias, --swiglu-limit describe SwiGLU networks; give --gated-ffn": {
        "gated_ffn_bias": True,
        "swiglu_limit": 7.0,
    },
    "--scale-heads changes stock's blocks, which --gated-ffn replaces": {
        "gated_ffn": True,
        "scale_heads": True,
    },
    "--attention-window is 0, expected a positive number": {"attention_window": 0},
    "--attention-window-layers needs --attention-window; add it": {"attention_window_layers": "2"},
    "--attention-window-layers is '[1,0,1]', expected a number N or 2 zeros and ones": {
        "attention_window": 8,
        "attention_window_layers": "[1,0,1]",
    },
    "--attention-window-layers [0]*2 gives no layer the window": {
        "attention_window": 8,
        "attention_window_layers": "[0]*2",
    },
    "does not say what the blocks of --mtp-layers see": {"attention_window": 8, "mtp_layers": 1},
    "--rope-untruncated need --rope-scaling yarn": {"position_embedding": "rope", "rope_untruncated": True},
    "--adaptive-input changes": {"gated_ffn": True, "adaptive_input": True},
    "--decoder-input-dim is 16": {"gated_ffn": True, "decoder_input_dim": 16},
}
LATENT_FIELDS = {
    "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6, "position_embedding": "rope",
}  # fmt: skip
REFUSED_LATENT: dict[str, dict[str, Any]] = {
    "which has no --decoder-kv-heads": {"decoder_kv_heads": 2},
    "which has no --attention-sinks, --attention-window.": {"attention_sinks": True, "attention_window": 8},
    "which has no --attention-multiplier": {"attention_multiplier": 0.1},
    "--attention-bias qkv does not describe": {"attention_bias": "qkv"},
    "needs --position-embedding rope": {"position_embedding": None},
    "--qk-rope-head-dim is 3": {"qk_rope_head_dim": 3},
}


class TestRefusals:
    @pytest.mark.parametrize("sentence", REFUSED)
    def test_one_sentence(self, sentence: str) -> None:
        problems = block_problems({**BASE, **REFUSED[sentence]})
        assert len(problems) == 1 and sentence in problems[0], problems

    @pytest.mark.parametrize("sentence", REFUSED_LATENT)
    def test_latent(self, sentence: str) -> None:
        assert block_problems({**BASE, **LATENT_FIELDS}) == []
        problems = block_problems({**BASE, **LATENT_FIELDS, **REFUSED_LATENT[sentence]})
        assert len(problems) == 1 and sentence in problems[0], problems

    def test_all_at_once(self) -> None:
        wrong = {
            "attention_sinks": True,
            "attention_window": 8,
            "attention_window_layers": "x",
            "mtp_layers": 1,
        }
        problems = block_problems({**BASE, **LATENT_FIELDS, **wrong, "qk_rope_head_dim": 3})
        assert len(problems) == 4, problems

    def test_stocks_flags_are_free_without_ours(self) -> None:
        assert block_problems({**BASE, "scale_heads": True, "adaptive_input": True}) == []
