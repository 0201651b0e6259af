"""Compare two models on the same tokens: ours from the checkpoint, and Hugging Face's from its directory."""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fairseq_moe.convert.hf.directory import read_json
from fairseq_moe.convert.hf.families import FAMILIES
from fairseq_moe.convert.hf.kinds import is_mxfp4, refuse_other_directories
from fairseq_moe.convert.store import CHECKPOINT
from fairseq_moe.data.identity_dictionary import IdentityDictionary, IdentityLine
from fairseq_moe.errors import CheckpointError, MoEError

__all__ = ["our_model", "refuse_quantized", "verify"]

_NUM_TOKENS = 48
_TOLERANCE = 1e-4  # of the largest logit; float32 noise is a tenth of it


def refuse_quantized(hf: Path) -> None:
    """Say before a long conversion that its result could not be compared.

    Raises:
        MoEError: the weights of this directory are quantised (other than MXFP4), or it holds what is not converted.
    """
    refuse_other_directories(hf)
    values = read_json(hf / "config.json")
    if values.get("quantization_config") is not None and not is_mxfp4(values):
        raise MoEError(
            f"--verify runs {hf} with transformers, which needs other packages or a GPU for quantised weights "
            "(quantization_config in config.json); leave out --verify, or give it to to-hf on the way back."
        )


def verify(hf: Path, ours: Path, *, dtype: torch.dtype | None = None) -> str:
    """Compare logits in float32, of ids that include the smallest and largest.

    Args:
        hf: a Hugging Face directory.
        ours: main file of a checkpoint, or the directory that holds it.
        dtype: that the weights on Hugging Face's side were rounded to; None: they were not.

    Returns:
        one sentence.

    Raises:
        CheckpointError: they differ.
        MoEError: transformers is not installed, or cannot run the directory.
    """
    ids, expected = _their_logits(hf)
    vocab_size = expected.shape[-1]
    with torch.no_grad():
        found = our_model(ours / CHECKPOINT if ours.is_dir() else ours, vocab_size, dtype)(ids)[0]
    difference = float((found[..., :vocab_size] - expected).abs().max() / expected.abs().max())
    if not difference <= _TOLERANCE:
        raise CheckpointError(
            f"the logits of {ours} differ from those of {hf} by {difference:.1e} of the largest one, expected "
            f"at most {_TOLERANCE:.0e}."
        )
    return f"verified: logits of both models on {ids.numel()} tokens differ by {difference:.1e} of the largest one"


def _their_logits(hf: Path) -> tuple[Tensor, Tensor]:
    """Draw token ids, and compute the logits of Hugging Face's model for them."""
    transformers = _transformers()
    try:
        settings = {}
        if is_mxfp4(read_json(hf / "config.json")):
            settings["quantization_config"] = transformers.Mxfp4Config(dequantize=True)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            hf,
            dtype=torch.float32,
            attn_implementation="eager",
            experts_implementation="eager",
            **settings,
            **_config(transformers, hf),
        ).eval()
        vocab_size = theirs.config.vocab_size
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(vocab_size, (2, _NUM_TOKENS), generator=generator)
        ids[0, :4] = torch.arange(4).clamp(max=vocab_size - 1)
        ids[1, 0] = vocab_size - 1
        with torch.no_grad():
            return ids, theirs(ids, use_cache=False).logits
    except Exception as error:  # it raises all kinds, and the conversion is done, whatever it says
        reason = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
        raise MoEError(
            f"the output is written but could not be compared: transformers does not run {hf} ({reason})."
        ) from error


def _config(transformers: Any, hf: Path) -> dict[str, Any]:
    """Hand transformers a configuration of a class that it has, where a family's own class is in the directory alone.

    That class is never run: it is code that came with the weights.
    """
    values = read_json(hf / "config.json")
    family = FAMILIES.get(str(values.get("model_type")))
    if family is None or family.runs_as is None:
        return {}
    known = {key: value for key, value in values.items() if key not in ("auto_map", "model_type")}
    return {"config": transformers.AutoConfig.for_model(family.runs_as, **known)}


def _transformers() -> Any:
    sys.modules.setdefault("torchaudio", None)  # type: ignore[arg-type]  # a broken one breaks transformers
    try:
        import transformers
    except ImportError as error:
        raise MoEError(
            f"--verify needs transformers ({error}); install it with: pip install 'fairseq_moe[hf]'"
        ) from error
    return transformers


def our_model(path: Path, vocab_size: int, dtype: torch.dtype | None = None) -> Any:
    """Load the model of a checkpoint, in float32, ready to be called with token ids (B, S).

    Args:
        path: of the main file.
        vocab_size: V.
        dtype: that ``to_hf`` rounds to; None: as it is.
    """
    from fairseq import checkpoint_utils
    from fairseq.tasks.language_modeling import LanguageModelingConfig, LanguageModelingTask

    dictionary = IdentityDictionary(IdentityLine(vocab_size=vocab_size, bos=None, eos=None))
    task = LanguageModelingTask(LanguageModelingConfig(), dictionary)
    models, _ = checkpoint_utils.load_model_ensemble([str(path)], task=task)
    model = models[0].float().eval()
    if dtype is not None:
        for parameter in model.parameters():  # routers' biases, which keep their bits, are buffers
            parameter.data = parameter.data.to(dtype).float()
    return model
