"""The same tokens through both models: ours from the checkpoint, and Hugging Face's from its directory."""

import sys
from pathlib import Path
from typing import Any

import torch

from fairseq_moe.convert.dictionary import IdentityDictionary
from fairseq_moe.convert.dictionary_file import IdentityLine
from fairseq_moe.convert.store import CHECKPOINT
from fairseq_moe.errors import CheckpointError, MoEError

__all__ = ["our_model", "verify"]

_NUM_TOKENS = 48
_TOLERANCE = 1e-4  # of the largest logit; float32 noise is a tenth of it


def verify(hf: Path, ours: Path) -> str:
    """Compare logits in float32, of ids that include the smallest and largest.

    Args:
        hf: a Hugging Face directory.
        ours: main file of a checkpoint, or the directory that holds it.

    Returns:
        one sentence.

    Raises:
        CheckpointError: they differ.
        MoEError: transformers is not installed.
    """
    transformers = _transformers()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        hf, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    vocab_size = theirs.config.vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab_size, (2, _NUM_TOKENS), generator=generator)
    ids[0, :4] = torch.arange(4)
    ids[1, 0] = vocab_size - 1
    with torch.no_grad():
        expected = theirs(ids, use_cache=False).logits
        del theirs
        found = our_model(ours / CHECKPOINT if ours.is_dir() else ours, vocab_size)(ids)[0]
    difference = float((found[..., :vocab_size] - expected).abs().max() / expected.abs().max())
    if not difference <= _TOLERANCE:
        raise CheckpointError(
            f"the logits of {ours} differ from those of {hf} by {difference:.1e} of the largest one, expected "
            f"at most {_TOLERANCE:.0e}."
        )
    return f"verified: logits of both models on {ids.numel()} tokens differ by {difference:.1e} of the largest one"


def _transformers() -> Any:
    sys.modules.setdefault("torchaudio", None)  # type: ignore[arg-type]  # a broken one breaks transformers
    try:
        import transformers
    except ImportError as error:
        raise MoEError(
            f"--verify needs transformers ({error}); install it with: pip install 'fairseq_moe[hf]'"
        ) from error
    return transformers


def our_model(path: Path, vocab_size: int) -> Any:
    """The model of a checkpoint, in float32, ready to be called with token ids (B, S)."""
    from fairseq import checkpoint_utils
    from fairseq.tasks.language_modeling import LanguageModelingConfig, LanguageModelingTask

    dictionary = IdentityDictionary(IdentityLine(vocab_size=vocab_size, bos=None, eos=None))
    task = LanguageModelingTask(LanguageModelingConfig(), dictionary)
    models, _ = checkpoint_utils.load_model_ensemble([str(path)], task=task)
    return models[0].float().eval()
