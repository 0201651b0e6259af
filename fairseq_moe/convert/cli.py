"""Run the command: ``python -m fairseq_moe.convert``, or ``fairseq-moe-convert``."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from fairseq_moe.convert.from_hf import Conversion, from_hf
from fairseq_moe.convert.stopping import Stopped, stopped_by_signals
from fairseq_moe.convert.to_hf import to_hf
from fairseq_moe.convert.upcycle import upcycle
from fairseq_moe.errors import MoEError

__all__ = ["main"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``fairseq-moe-convert`` with these arguments.

    Args:
        arguments: command line without the program's name; None: the process's own.

    Returns:
        Exit code: 0; 2 after an error, which is one sentence on stderr; 128 + n after signal n.
    """
    args = _parser().parse_args(arguments)
    try:
        with stopped_by_signals():
            args.run(args)
    except Stopped as stop:
        print(
            f"fairseq_moe.convert: stopped by {stop.signal.name}; no incomplete directory is left{args.left}.",
            file=sys.stderr,
        )
        return 128 + stop.signal
    except MoEError as error:
        print(f"fairseq_moe.convert: {error}", file=sys.stderr)
        return 2
    return 0


def _report(done: Conversion) -> None:
    for note in done.notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"{done.spec.family}: {done.num_tensors} tensors, {done.num_bytes / 1e9:.3f} GB")
    print(f"sha256 of the tensors (names, dtypes, shapes, bits): {done.digest}")
    print(f"written: {done.target}")


def _from_hf(args: argparse.Namespace) -> None:
    if args.verify:
        from fairseq_moe.convert.verify import refuse_quantized

        refuse_quantized(args.directory)
    done = from_hf(
        args.directory,
        args.to,
        expert_parallel_size=args.expert_parallel_size,
        fp8_to=_DTYPES[args.fp8_to],
        ignored_keys=args.ignore_config_key,
    )
    _report(done)
    if args.verify:
        _verify(args.directory, done.target)


def _to_hf(args: argparse.Namespace) -> None:
    dtype = None if args.dtype is None else _DTYPES[args.dtype]
    done = to_hf(
        args.checkpoint,
        args.to,
        companions=args.companions,
        dtype=dtype,
        ignored_keys=args.ignore_config_key,
    )
    _report(done)
    if args.verify:
        _verify(args.to, args.checkpoint, dtype)


def _preprocess(args: argparse.Namespace) -> None:
    from fairseq_moe.convert.preprocess import preprocess  # needs fairseq

    texts = {split: getattr(args, f"{split}pref") for split in ("train", "valid", "test")}
    texts = {split: path for split, path in texts.items() if path is not None}
    if not texts:
        raise MoEError("there is no text; give --trainpref, --validpref or --testpref.")
    counts = preprocess(
        args.model,
        args.destdir,
        texts,
        tokenizer=args.tokenizer,
        prepend_bos=args.prepend_bos,
        append_eos=not args.no_append_eos,
        num_workers=args.workers,
    )
    for split, count in counts.items():
        print(f"{split}: {count} tokens")
    print(f"written: {args.destdir}")


def _upcycle(args: argparse.Namespace) -> None:
    done = upcycle(
        args.checkpoint,
        args.to,
        num_experts=args.num_experts,
        top_k=args.topk,
        granularity=args.granularity,
        layers=args.moe_layer_freq,
        num_shards=args.expert_parallel_size,
        seed=args.seed,
    )
    if not done.is_equal:
        print(
            "note: with this activation slices do not add up: the model begins as another.", file=sys.stderr
        )
    flags = [
        part for name, value in done.flags.items() for part in (f"--{name.replace('_', '-')}", str(value))
    ]
    print(f"train it with the dense model's flags and: {shlex.join(flags)}")
    print(f"written: {done.target}")


def _verify(hf: Path, ours: Path, dtype: torch.dtype | None = None) -> None:
    from fairseq_moe.convert.verify import verify  # builds models: needs fairseq and transformers

    print(verify(hf, ours, dtype=dtype))


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 up")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fairseq-moe-convert",
        description="Convert mixture-of-experts models between Hugging Face directories and checkpoints.",
    )
    parser.set_defaults(left="")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("from-hf", help="from a Hugging Face directory to our checkpoint")
    command.add_argument("directory", type=Path, help="with config.json and safetensors files")
    command.add_argument("--to", type=Path, required=True, metavar="OUT", help="directory to be made")
    command.add_argument(
        "--expert-parallel-size",
        type=_positive,
        default=1,
        metavar="N",
        help="files over which the experts are spread (default: 1); any number of ranks reads them",
    )
    command.add_argument(
        "--fp8-to",
        choices=_DTYPES,
        default="bfloat16",
        help="what FP8 and MXFP4 weights become (default: %(default)s)",
    )
    _add_ignored(command)
    command.set_defaults(run=_from_hf)
    _add_verify(command)
    command = commands.add_parser("to-hf", help="from our checkpoint to a Hugging Face directory")
    command.add_argument("checkpoint", type=Path, help="its .pt file, or a directory that from-hf made")
    command.add_argument("--to", type=Path, required=True, metavar="DIR", help="directory to be made")
    command.add_argument(
        "--companions",
        type=Path,
        metavar="DIR",
        help="where config.json and the tokenizer are (default: hf beside the checkpoint, or beside the one "
        "that training began with)",
    )
    command.add_argument(
        "--dtype", choices=_DTYPES, help="of the weights (default: as they are in the checkpoint)"
    )
    _add_ignored(command)
    command.set_defaults(run=_to_hf)
    _add_verify(command)
    _add_preprocess(commands.add_parser("preprocess", help="from text to data for a converted model"))
    _add_upcycle(commands.add_parser("upcycle", help="from a dense checkpoint to one with experts"))
    return parser


def _add_upcycle(command: argparse.ArgumentParser) -> None:
    command.add_argument("checkpoint", type=Path, help="of a dense transformer_lm")
    command.add_argument("--to", type=Path, required=True, metavar="OUT", help="directory to be made")
    command.add_argument(
        "--num-experts", type=_positive, required=True, metavar="E", help="experts per layer"
    )
    command.add_argument(
        "--topk", type=_positive, default=2, metavar="K", help="experts per token (default: 2)"
    )
    command.add_argument(
        "--granularity",
        type=_positive,
        default=1,
        metavar="G",
        help="cut each network into G experts (default: 1)",
    )
    command.add_argument(
        "--moe-layer-freq", default="1", help="which layers, as in fairseq-train (default: 1, all)"
    )
    command.add_argument(
        "--expert-parallel-size", type=_positive, default=1, metavar="N", help="as in from-hf"
    )
    command.add_argument("--seed", type=int, default=1, help="of the router (default: 1)")
    command.set_defaults(run=_upcycle)


def _add_preprocess(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", type=Path, help="directory that from-hf made")
    for split in ("train", "valid", "test"):
        command.add_argument(
            f"--{split}pref",
            type=Path,
            nargs="+",
            action="extend",
            metavar="FILE",
            help=f"UTF-8 text of the {split} split, in this order",
        )
    command.add_argument("--destdir", type=Path, required=True, metavar="DIR", help="directory to be made")
    command.add_argument(
        "--tokenizer", type=Path, metavar="FILE", help="default: hf/tokenizer.json of the model"
    )
    command.add_argument(
        "--prepend-bos", action="store_true", help="begin lines with the model's beginning token"
    )
    command.add_argument("--no-append-eos", action="store_true", help="do not end lines with the end token")
    command.add_argument(
        "--workers", type=_positive, metavar="N", help="processes that encode (default: one for each core)"
    )
    left = ", and the same command goes on from the pieces that are finished"
    command.set_defaults(run=_preprocess, left=left)


def _add_ignored(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--ignore-config-key",
        action="append",
        default=[],
        metavar="NAME",
        help="a key of config.json that nobody here knows and that changes nothing; may be given several times",
    )


def _add_verify(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--verify",
        action="store_true",
        help="then compare the logits of both models on random tokens (needs transformers, and memory for both)",
    )
