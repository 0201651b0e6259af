"""Register the ``transformer_lm`` architectures with experts, under their stock names.

Stock refuses a second model of the same name, so the registry entries are replaced (``adopt_architectures``).
Without a flag that asks for experts or our own blocks the stock model is built, by stock's code.
"""

from dataclasses import dataclass, fields
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
from fairseq_moe.models.decoder import MoEDecoder
from fairseq_moe.models.embedding import build_word_embedding
from fairseq_moe.models.fitting import shape_problems
from fairseq_moe.models.flags import MODEL_RECORDS, add_list_arguments, fairseq_dataclass
from fairseq_moe.models.padding_flag import add_padding_argument
from fairseq_moe.models.presets import register_presets
from fairseq_moe.models.sizes import model_size

__all__ = ["MoETransformerLanguageModel", "MoETransformerLanguageModelConfig", "adopt_architectures"]

_NAME = "transformer_lm"


_DeclaredFlags: Any = fairseq_dataclass("_DeclaredFlags", *MODEL_RECORDS)


@dataclass
class MoETransformerLanguageModelConfig(TransformerLanguageModelConfig, _DeclaredFlags):  # type: ignore[misc]
    """Hold stock's flags of a transformer language model and those that ``fairseq_moe.flags`` declares."""

    batch_size: Optional[int] = II("dataset.batch_size")


class MoETransformerLanguageModel(TransformerLanguageModel):
    """Model a language with a transformer that has experts; dense if no flag asks for any."""

    @classmethod
    def add_args(cls, parser: Any) -> None:
        """Add the model's flags to a command's parser."""
        add_list_arguments(parser)
        own = MoETransformerLanguageModelConfig.__dataclass_fields__
        add_padding_argument(parser, help_text=own["use_moe_pad_mask"].metadata["help"])
        super().add_args(parser)

    @classmethod
    def build_embedding(cls, args: Any, dictionary: Any, embed_dim: int, path: Any = None) -> Any:
        """Build stock's embedding; our own blocks also take a dictionary whose padding is none of its words."""
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
            decoder.size = decoder.stage.total(model_size(decoder))
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
    """Compare the model's flags over all ranks: with different ones they would exchange other things, or wait."""
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
