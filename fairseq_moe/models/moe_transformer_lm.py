"""The ``transformer_lm`` architectures with experts, under their stock names.

Stock refuses a second model of the same name, so the registry entries are replaced (``adopt_architectures``).
Without a flag that asks for experts or our own blocks the stock model is built, by stock's code.
"""

from dataclasses import dataclass, field, fields
from typing import Any, Optional

from fairseq.models import (
    ARCH_MODEL_INV_REGISTRY,
    ARCH_MODEL_REGISTRY,
    MODEL_DATACLASS_REGISTRY,
    MODEL_REGISTRY,
)
from fairseq.models.transformer_lm import TransformerLanguageModel, TransformerLanguageModelConfig
from hydra.core.config_store import ConfigStore
from omegaconf import II

from fairseq_moe.data.dictionary_record import dictionary_problem
from fairseq_moe.distributed import gather_values
from fairseq_moe.errors import CheckpointError, ConfigError
from fairseq_moe.flags.agreement import disagreements
from fairseq_moe.flags.blocks import BlocksConfig
from fairseq_moe.flags.freezing import frozen_modules
from fairseq_moe.flags.moe import MoEConfig
from fairseq_moe.flags.records import getter
from fairseq_moe.models.attention import fuse_attention
from fairseq_moe.models.blocks_flags import BlocksFlags
from fairseq_moe.models.decoder import MoEDecoder
from fairseq_moe.models.embedding import build_word_embedding
from fairseq_moe.models.fitting import shape_problems
from fairseq_moe.models.megatron_flags import MegatronFlags, add_list_arguments
from fairseq_moe.models.padding_flag import add_padding_argument
from fairseq_moe.models.presets import register_presets
from fairseq_moe.models.reliability_flags import ReliabilityFlags
from fairseq_moe.models.sizes import model_size

__all__ = ["MoETransformerLanguageModel", "MoETransformerLanguageModelConfig", "adopt_architectures"]

_NAME = "transformer_lm"


@dataclass
class MoETransformerLanguageModelConfig(
    TransformerLanguageModelConfig, MegatronFlags, BlocksFlags, ReliabilityFlags
):
    """Stock's flags and the expert flags, with the moe branch's names and defaults."""

    moe_freq: int = field(default=0, metadata={"help": "every N-th decoder layer has experts; 0: none"})
    moe_expert_count: int = field(default=0, metadata={"help": "experts of each MoE layer, over all ranks"})
    moe_expert_ffn_dim: Optional[int] = field(
        default=None, metadata={"help": "hidden width of an expert (default: --decoder-ffn-embed-dim)"}
    )
    moe_top1_expert: bool = field(default=False, metadata={"help": "one expert per token instead of two"})
    moe_gating_use_fp32: bool = field(
        default=False, metadata={"help": "router softmax and all that follows it in float32"}
    )
    moe_second_expert_policy: str = field(
        default="sampling",
        metadata={"help": "choice of the second expert while training: sampling, random or all"},
    )
    moe_normalize_gate_prob_before_dropping: bool = field(
        default=False, metadata={"help": "normalise the two weights before tokens are dropped"}
    )
    moe_batch_prioritized_routing: bool = field(
        default=False, metadata={"help": "the surest tokens choose first (two experts only)"}
    )
    moe_eval_capacity_token_fraction: float = field(
        default=0.25,
        metadata={"help": "expert capacity in evaluation, as a share of the tokens; <= 0: the training rule"},
    )
    moe_generation_capacity_token_fraction: Optional[float] = field(
        default=None,
        metadata={"help": "the same for incremental decoding (default: nothing is dropped)"},
    )
    moe_normalize_expert_grad: str = field(
        default="world_size",
        metadata={"help": "divisor of expert gradients: world_size, or sqrt_world_size (fully_sharded only)"},
    )
    use_moe_pad_mask: Optional[bool] = field(
        default=None,
        metadata={
            "help": "padding is routed nowhere, and with --num-experts it is in no loss, capacity or statistic; alone, "
            "or with true or false (default: true with --num-experts, false with --moe-freq)"
        },
    )
    record_a2a_perf_stats: bool = field(
        default=False, metadata={"help": "log the time of the expert exchange (synchronises the device)"}
    )
    dummy_a2a: bool = field(
        default=False,
        metadata={"help": "leave out the expert exchange, to measure its cost; results are wrong"},
    )
    alternate_decoder_ffn_embed_dim: int = field(
        default=0, metadata={"help": "MoE positions hold dense networks of this width instead of experts"}
    )
    use_stable_embedding: bool = field(
        default=False,
        metadata={
            "help": "refused: bitsandbytes embeddings are not supported",
            "argparse_alias": "--stable-emb",
        },
    )
    moe_per_layer_logging: bool = field(
        default=False, metadata={"help": "log losses, loads and statistics of every MoE layer"}
    )
    moe_layer_recompute: bool = field(
        default=False, metadata={"help": "compute MoE layers again in the backward pass, to save memory"}
    )
    moe_recompute_modules: Optional[str] = field(
        default=None,
        metadata={"help": "the same for parts of MoE layers: moe (all), experts, shared_experts, or several"},
    )
    moe_freeze_modules: Optional[str] = field(
        default=None,
        metadata={"help": "leave routers (with the expert bias), experts, or both as they are"},
    )
    fused_attention: bool = field(
        default=False,
        metadata={"help": "self-attention by torch's fused causal kernel; equal to stock's within rounding"},
    )
    batch_size: Optional[int] = II("dataset.batch_size")
    num_workers_valid: Optional[int] = field(
        default=None, metadata={"help": "data loading workers in validation (default: --num-workers)"}
    )


class MoETransformerLanguageModel(TransformerLanguageModel):
    """A transformer language model with experts; dense if no flag asks for any."""

    @classmethod
    def add_args(cls, parser: Any) -> None:
        """Add the model's flags."""
        add_list_arguments(parser)
        own = MoETransformerLanguageModelConfig.__dataclass_fields__
        add_padding_argument(parser, help_text=own["use_moe_pad_mask"].metadata["help"])
        super().add_args(parser)

    @classmethod
    def build_embedding(cls, args: Any, dictionary: Any, embed_dim: int, path: Any = None) -> Any:
        """Stock's; our own blocks also take a dictionary whose padding is none of its words."""
        if BlocksConfig.from_args(args).enabled:
            return build_word_embedding(dictionary, embed_dim)
        return super().build_embedding(args, dictionary, embed_dim, path)

    @classmethod
    def build_model(cls, args: Any, task: Any) -> TransformerLanguageModel:
        """Build the model that ``args`` describes; stock's own when no layer has experts."""
        moe = MoEConfig.from_args(args)
        if moe.enabled:
            _check_agreement(args)
        if moe.enabled or moe.is_pseudo_moe or BlocksConfig.from_args(args).enabled:
            if args.max_target_positions is None:
                args.max_target_positions = args.tokens_per_sample
            embed_tokens = cls.build_embedding(args, task.source_dictionary, args.decoder_input_dim)
            decoder = MoEDecoder(args, task.target_dictionary, embed_tokens, no_encoder_attn=True)
            decoder.size = model_size(decoder)
            decoder.freeze(frozen_modules(args))
            model = cls(decoder)
        else:
            model = TransformerLanguageModel.build_model(args, task)
        if moe.fused_attention:
            fuse_attention(model)
        return model

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a checkpoint's tensors as stock does, unless they are those of another model or dictionary.

        Raises:
            CheckpointError: a shape differs, a tensor is missing, or the ids of the tokens mean other words.
        """
        source = getattr(state_dict, "source", "the checkpoint")
        recorded = getattr(state_dict, "dictionary", None)
        other = dictionary_problem(recorded, getattr(self.decoder, "dictionary", None))
        shapes = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
        problems = [other] if other else shape_problems(shapes, self)
        if problems:
            raise CheckpointError(f"{source} does not fit this model: {'; '.join(problems)}.")
        try:
            return super().load_state_dict(state_dict, *args, **kwargs)
        except RuntimeError as error:  # torch lists the names that are missing or too many
            raise CheckpointError(
                f"{source} does not fit this model: {' '.join(str(error).split())}"
            ) from error


def _check_agreement(args: Any) -> None:
    """Compare the model's flags over all ranks; with other ones they would exchange different things, or wait."""
    get = getter(args)
    own = {flag.name: str(get(flag.name)) for flag in fields(MoETransformerLanguageModelConfig)}
    problems = disagreements(gather_values(own))
    if problems:
        raise ConfigError(problems)


def adopt_architectures() -> None:
    """Put the flags and model under every ``transformer_lm*`` name and the presets', for --arch and for hydra."""
    MODEL_REGISTRY[_NAME] = MoETransformerLanguageModel
    MODEL_DATACLASS_REGISTRY[_NAME] = MoETransformerLanguageModelConfig
    setattr(MoETransformerLanguageModel, "__dataclass", MoETransformerLanguageModelConfig)
    register_presets(_store)
    for arch in ARCH_MODEL_INV_REGISTRY[_NAME]:
        ARCH_MODEL_REGISTRY[arch] = MoETransformerLanguageModel
    _store(_NAME, {})


def _store(name: str, flags: dict[str, Any]) -> None:
    """Let hydra's users say ``model=NAME``."""
    node = MoETransformerLanguageModelConfig(**flags)
    node._name = _NAME
    ConfigStore.instance().store(name=name, group="model", node=node, provider="fairseq_moe")
