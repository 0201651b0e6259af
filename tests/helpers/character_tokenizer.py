"""Write a tokenizer whose tokens are characters beside a tiny model: for transformers and for us, in one directory."""

from pathlib import Path

__all__ = ["write_character_tokenizer"]

_CHARACTERS = "abcdefghijklmnopqrstuvwxyz ,.\n"


def write_character_tokenizer(directory: Path, *, template: bool = False, **settings: object) -> None:
    """Write tokenizer.json and tokenizer_config.json; 0 is an unknown character, 1 begins and 2 ends a text.

    Args:
        directory: of a model.
        template: tokenizer.json puts the beginning token before a text and the end token behind it.
        settings: further ones of tokenizer_config.json.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    from tests.helpers.hf import import_transformers

    words = ["<unk>", "<s>", "</s>", *_CHARACTERS]
    tokenizer = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    if template:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = import_transformers().PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", **settings
    )
    fast.save_pretrained(directory)
