"""The blocks that newer decoders are made of, as flags: what they mean together, and every reason to refuse them.

Any of these flags builds the decoder from our own blocks instead of stock's layers. A block whose flag is not
given is stock's: LayerNorm, attention with biases and as many key heads as query heads, a network of two matrices
with biases. Layers normalise before each block, as every stock language model does.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from fairseq_moe.flags.records import getter, given_fields
from fairseq_moe.modules.blocks.grouped import GroupedAttentionConfig
from fairseq_moe.modules.blocks.latent import LatentAttentionConfig
from fairseq_moe.modules.blocks.rope import RotaryConfig, YarnConfig

__all__ = ["BlocksConfig", "block_problems"]

_DEFAULT_INIT_STD = 0.02
_DEFAULT_EPS = 1e-5
_DEFAULT_THETA = 10_000.0


@dataclass(frozen=True, kw_only=True)
class BlocksConfig:
    """The flags; None means that one was not given. Help texts are in ``models.blocks_flags``."""

    decoder_normalization: str | None = None
    norm_eps: float | None = None
    position_embedding: str | None = None
    rope_theta: float | None = None
    rope_interleaved: bool = False
    rotary_fraction: float | None = None
    rope_scaling: str | None = None
    rope_scaling_factor: float | None = None
    rope_original_max_positions: int | None = None
    rope_beta_fast: float | None = None
    rope_beta_slow: float | None = None
    rope_mscale: float | None = None
    rope_mscale_all_dim: float | None = None
    rope_attention_factor: float | None = None
    decoder_kv_heads: int | None = None
    decoder_head_dim: int | None = None
    attention_bias: str | None = None
    qk_norm: str | None = None
    clip_qkv: float | None = None
    kv_lora_rank: int | None = None
    q_lora_rank: int | None = None
    qk_nope_head_dim: int | None = None
    qk_rope_head_dim: int | None = None
    v_head_dim: int | None = None
    gated_ffn: bool = False
    mtp_layers: int = 0
    mtp_loss_weight: float = 0.0
    init_std: float | None = None

    @classmethod
    def from_args(cls, args: Any) -> "BlocksConfig":
        """Read the fields that ``args`` (a namespace, config or mapping) has."""
        return cls(**given_fields(cls, args))

    @property
    def enabled(self) -> bool:
        """Whether the decoder is built from these blocks."""
        return self != BlocksConfig()

    @property
    def is_latent(self) -> bool:
        """Whether attention is latent (MLA)."""
        return self.kv_lora_rank is not None

    @property
    def eps(self) -> float:
        """Of the norms, but those of latent attention, which have DeepSeek's."""
        return _DEFAULT_EPS if self.norm_eps is None else self.norm_eps

    @property
    def std(self) -> float:
        """Of the weights at the start."""
        return _DEFAULT_INIT_STD if self.init_std is None else self.init_std

    def rotary_config(self) -> RotaryConfig | None:
        """How heads turn; None: they do not."""
        if self.position_embedding != "rope":
            return None
        return RotaryConfig(
            theta=_DEFAULT_THETA if self.rope_theta is None else self.rope_theta,
            interleaved=self.rope_interleaved,
            fraction=1.0 if self.rotary_fraction is None else self.rotary_fraction,
            yarn=self._yarn(),
        )

    def _yarn(self) -> YarnConfig | None:
        if self.rope_scaling is None:
            return None
        assert self.rope_scaling_factor is not None and self.rope_original_max_positions is not None
        return YarnConfig(
            factor=self.rope_scaling_factor,
            original_max_positions=self.rope_original_max_positions,
            beta_fast=YarnConfig.beta_fast if self.rope_beta_fast is None else self.rope_beta_fast,
            beta_slow=YarnConfig.beta_slow if self.rope_beta_slow is None else self.rope_beta_slow,
            mscale=self.rope_mscale,
            mscale_all_dim=self.rope_mscale_all_dim,
            attention_factor=self.rope_attention_factor,
        )

    def rotary_head_dim(self, *, model_dim: int, num_heads: int) -> int:
        """Size of the vectors that turn."""
        return self.qk_rope_head_dim or self._head_dim(model_dim, num_heads)

    def _head_dim(self, model_dim: int, num_heads: int) -> int:
        return self.decoder_head_dim or model_dim // num_heads

    def attention_config(
        self, *, model_dim: int, num_heads: int, dropout: float
    ) -> GroupedAttentionConfig | LatentAttentionConfig:
        """The attention of every layer."""
        if self.kv_lora_rank is None:
            return GroupedAttentionConfig(
                model_dim=model_dim,
                num_heads=num_heads,
                num_kv_heads=self.decoder_kv_heads or num_heads,
                head_dim=self._head_dim(model_dim, num_heads),
                bias=self.attention_bias or "all",
                qk_norm=self.qk_norm or "none",
                norm_eps=self.eps,
                clip=self.clip_qkv,
                dropout=dropout,
            )
        assert self.qk_nope_head_dim and self.qk_rope_head_dim and self.v_head_dim
        return LatentAttentionConfig(
            model_dim=model_dim,
            num_heads=num_heads,
            kv_rank=self.kv_lora_rank,
            q_rank=self.q_lora_rank,
            nope_dim=self.qk_nope_head_dim,
            rope_dim=self.qk_rope_head_dim,
            value_dim=self.v_head_dim,
            bias=self.attention_bias == "all",
            dropout=dropout,
        )

    def problems(self, *, model_dim: int, num_heads: int) -> list[str]:
        """One sentence per flag that cannot be honoured."""
        found = self._choice_problems() + self._range_problems()
        if found:
            return found
        found = self._rotary_problems() + self._latent_problems()
        if not self.is_latent and not found:
            found += self._head_problems(model_dim, num_heads)
        if self.mtp_loss_weight and not self.mtp_layers:
            found.append("--mtp-loss-weight needs --mtp-layers; add it.")
        return found

    def _choice_problems(self) -> list[str]:
        choices: dict[str, tuple[str, ...]] = {
            "decoder_normalization": ("layernorm", "rmsnorm"),
            "position_embedding": ("rope", "none"),
            "rope_scaling": ("yarn",),
            "attention_bias": ("none", "qkv", "all"),
            "qk_norm": ("none", "head", "full"),
        }
        return [
            f"{_flag(name)} is {getattr(self, name)!r}, expected one of {', '.join(allowed)}."
            for name, allowed in choices.items()
            if getattr(self, name) not in (None, *allowed)
        ]

    def _range_problems(self) -> list[str]:
        found = []
        for name, (is_good, expected) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not is_good(value):
                found.append(f"{_flag(name)} is {value}, expected {expected}.")
        return found

    def _rotary_problems(self) -> list[str]:
        found = []
        if self.position_embedding != "rope":
            stray = self._given("rope_", "rotary_")
            if stray:
                found.append(f"{', '.join(stray)} need --position-embedding rope; add it.")
        yarn = [flag for flag in self._given("rope_") if flag in _YARN_FLAGS]
        if self.rope_scaling is None and yarn:
            found.append(f"{', '.join(yarn)} need --rope-scaling yarn; add it.")
        missing = self.rope_scaling_factor is None or self.rope_original_max_positions is None
        if self.rope_scaling is not None and missing:
            found.append(
                "--rope-scaling yarn needs --rope-scaling-factor and --rope-original-max-positions; add them."
            )
        return found

    def _latent_problems(self) -> list[str]:
        sizes = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        if not self.is_latent:
            stray = [_flag(name) for name in ("q_lora_rank", *sizes) if getattr(self, name) is not None]
            return [f"{', '.join(stray)} describe latent attention; give --kv-lora-rank."] if stray else []
        found = []
        missing = [_flag(name) for name in sizes if getattr(self, name) is None]
        if missing:
            found.append(f"--kv-lora-rank needs {', '.join(missing)}; add them.")
        rivals = ("decoder_kv_heads", "decoder_head_dim", "qk_norm", "clip_qkv", "rotary_fraction")
        given = [_flag(name) for name in rivals if getattr(self, name) is not None]
        if given:
            found.append(f"--kv-lora-rank asks for latent attention, which has no {', '.join(given)}.")
        if self.attention_bias == "qkv":
            found.append("--attention-bias qkv does not describe latent attention; choose none or all.")
        if self.position_embedding != "rope":
            found.append("--kv-lora-rank needs --position-embedding rope; add it.")
        if not missing and self.qk_rope_head_dim is not None and self.qk_rope_head_dim % 2:
            found.append(f"--qk-rope-head-dim is {self.qk_rope_head_dim}, expected an even number.")
        if not missing and (self.v_head_dim or 0) > (self.qk_nope_head_dim or 0) + (
            self.qk_rope_head_dim or 0
        ):
            found.append("--v-head-dim is more than --qk-nope-head-dim and --qk-rope-head-dim together.")
        return found

    def _head_problems(self, model_dim: int, num_heads: int) -> list[str]:
        found = []
        if self.decoder_head_dim is None and model_dim % num_heads:
            found.append(
                f"--decoder-embed-dim {model_dim} is not a multiple of --decoder-attention-heads {num_heads}; "
                "give --decoder-head-dim."
            )
        if num_heads % (self.decoder_kv_heads or 1):
            found.append(
                f"--decoder-kv-heads is {self.decoder_kv_heads}, expected a divisor of the {num_heads} heads "
                "(--decoder-attention-heads)."
            )
        turning = int(self._head_dim(model_dim, num_heads) * (self.rotary_fraction or 1.0))
        if self.position_embedding == "rope" and (turning % 2 or not turning):
            found.append(
                f"rotary positions turn pairs, and {turning} values of each head turn; make that even."
            )
        return found

    def _given(self, *prefixes: str) -> list[str]:
        default = BlocksConfig()
        return [
            _flag(field.name)
            for field in fields(self)
            if field.name.startswith(prefixes) and getattr(self, field.name) != getattr(default, field.name)
        ]


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


_YARN_FLAGS = {
    _flag(name)
    for name in (
        "rope_scaling_factor", "rope_original_max_positions", "rope_beta_fast", "rope_beta_slow", "rope_mscale",
        "rope_mscale_all_dim", "rope_attention_factor",
    )
}  # fmt: skip

_POSITIVE: tuple[Callable[[Any], bool], str] = (lambda value: 0 < value < float("inf"), "a positive number")
_NOT_NEGATIVE: tuple[Callable[[Any], bool], str] = (lambda value: 0 <= value < float("inf"), "at least 0")
_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(
        (
            "norm_eps", "rope_theta", "rope_scaling_factor", "rope_original_max_positions", "rope_beta_fast",
            "rope_beta_slow", "rope_attention_factor", "decoder_kv_heads", "decoder_head_dim", "clip_qkv",
            "kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "init_std",
        ),
        _POSITIVE,
    ),
    **dict.fromkeys(("rope_mscale", "rope_mscale_all_dim", "mtp_layers", "mtp_loss_weight"), _NOT_NEGATIVE),
    "rotary_fraction": (lambda value: 0 < value <= 1, "more than 0 and at most 1"),
}  # fmt: skip

# Stock's flags that change blocks which are not there, and their values that mean "not given".
_STOCK_BLOCKS: Mapping[str, tuple[Any, ...]] = {
    "adaptive_input": (None, False),
    "adaptive_softmax_cutoff": (None,),
    "alternate_decoder_ffn_embed_dim": (None, 0),
    "base_layers": (None, 0),
    "character_embeddings": (None, False),
    "decoder_xformers_att_config": (None,),
    "quant_noise_pq": (None, 0),
    "quant_noise_scalar": (None, 0),
    "scale_attn": (None, False),
    "scale_fc": (None, False),
    "scale_heads": (None, False),
    "scale_resids": (None, False),
}


def block_problems(model: Any) -> list[str]:
    """One sentence per flag of a model that cannot be honoured.

    Args:
        model: the model's flags (a namespace, config or mapping).
    """
    config = BlocksConfig.from_args(model)
    if not config.enabled:
        return []
    get = getter(model)
    found = config.problems(
        model_dim=int(get("decoder_embed_dim") or 0), num_heads=int(get("decoder_attention_heads") or 1)
    )
    flags = config._given("")
    for name, absent in _STOCK_BLOCKS.items():
        if get(name) not in absent:
            found.append(f"{_flag(name)} changes stock's blocks, which {flags[0]} replaces; leave one out.")
    for name in ("decoder_input_dim", "decoder_output_dim"):
        if get(name) not in (None, get("decoder_embed_dim")):
            found.append(
                f"{_flag(name)} is {get(name)}, expected --decoder-embed-dim {get('decoder_embed_dim')} with "
                f"{flags[0]}."
            )
    return found
