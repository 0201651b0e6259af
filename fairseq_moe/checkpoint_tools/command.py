"""Parse and run the command line of ``fairseq-moe-checkpoint``."""

import argparse
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from fairseq_moe.checkpoint import damage_as_sentence, newest_intact
from fairseq_moe.checkpoint_tools.averaging import average, last_checkpoints
from fairseq_moe.checkpoint_tools.copying import reshard
from fairseq_moe.checkpoint_tools.dense import to_dense
from fairseq_moe.checkpoint_tools.inspecting import Description, describe
from fairseq_moe.checkpoint_tools.source import open_source
from fairseq_moe.errors import CheckpointError, MoEError
from fairseq_moe.progress import progress

__all__ = ["main"]

_PROGRAM = "fairseq-moe-checkpoint"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one tool for checkpoints.

    Args:
        arguments: command line without the program's name; None: the process's own.

    Returns:
        Exit code: 0, or 2 after an error, which is one sentence on stderr. Wrong flags exit with 2 as well.
    """
    args = _parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], int] = args.run
    try:
        return run(args)
    except MoEError as error:
        print(f"{_PROGRAM}: {error}", file=sys.stderr)
        return 2


def _inspect(args: argparse.Namespace) -> int:
    source = open_source(args.path)
    with damage_as_sentence(args.path):
        description = describe(source)
    _print(description)
    return 0


def _print(description: Description) -> None:
    for name, value in description.facts:
        print(f"{name + ':':12}{value}")
    header = ("file", "experts", "bytes")
    if importlib.util.find_spec("rich") is not None:
        from rich import box
        from rich.console import Console
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for name in header:
            table.add_column(name, justify="right" if name == "bytes" else "left", overflow="fold")
        for row in description.files:
            table.add_row(*row)
        Console(highlight=False).print(table)
        return
    rows = [header, *description.files]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    for file, experts, num_bytes in rows:
        print(f"{file:{widths[0]}}  {experts:{widths[1]}}  {num_bytes}")


def _verify(args: argparse.Namespace) -> int:
    damaged: list[Path] = []
    for path in args.paths:
        problems = list(_problems(path))
        if problems:
            damaged.append(path.parent)
        for problem in problems:
            print(f"{_PROGRAM}: {problem}", file=sys.stderr)
    for directory in dict.fromkeys(damaged):
        intact = newest_intact(directory)
        found = (
            "there is no intact MoE checkpoint" if intact is None else f"the newest intact one is {intact}"
        )
        print(f"{_PROGRAM}: in {directory} {found}.", file=sys.stderr)
    return 2 if damaged else 0


def _problems(path: Path) -> Iterator[str]:
    """Verify one checkpoint: a sentence for each problem; prints a line if there is none."""
    try:
        source = open_source(path)
        with progress(f"verifying {path.name}", source.unverified_bytes) as advance:
            problems = list(source.problems(advance))
    except CheckpointError as error:
        problems = [str(error)]
    yield from problems
    if not problems:
        print(f"intact: {path} ({source.kind}, {source.num_bytes:,} bytes in {len(source.files)} files)")


def _reshard(args: argparse.Namespace) -> int:
    reshard(args.path, args.to, num_shards=args.shards, with_optimizer=not args.no_optimizer)
    return _written(args.to)


def _average(args: argparse.Namespace) -> int:
    if bool(args.paths) == (args.last is not None):
        raise MoEError("average takes the paths of checkpoints or --last N DIR, one of the two; give one.")
    if args.last is None:
        sources = [open_source(path) for path in args.paths]
    else:
        count, directory = args.last
        if not count.isdecimal():
            raise MoEError(
                f"--last takes a number and a directory, found {count!r}; give both in that order."
            )
        sources = last_checkpoints(int(count), Path(directory))
    average(sources, args.to)
    return _written(args.to)


def _to_dense(args: argparse.Namespace) -> int:
    to_dense(args.path, args.to, expert=args.expert)
    return _written(args.to)


def _written(to: Path) -> int:
    print(f"written: {to}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=_PROGRAM,
        description="Look at, check, copy and convert checkpoints: of this package, of the moe branch (under "
        "their plain name) and dense ones of stock fairseq. What a file is, is found out by looking at it.",
    )
    tools = parser.add_subparsers(required=True, metavar="TOOL")

    def add(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        tool = tools.add_parser(name, help=text, description=text)
        tool.set_defaults(run=run)
        return tool

    tool = add("inspect", _inspect, "say what a checkpoint is and where its experts lie")
    tool.add_argument("path", type=Path)
    tool = add("verify", _verify, "compare every file with its digests; exit code 2 if any differs")
    tool.add_argument("paths", type=Path, nargs="+", metavar="path")
    tool = add("reshard", _reshard, "copy an MoE checkpoint into another number of shard files")
    _add_copy_arguments(tool)
    tool.add_argument("--shards", type=int, required=True, metavar="N")
    tool = add("consolidate", _reshard, "copy an MoE checkpoint into one shard file")
    _add_copy_arguments(tool)
    tool.set_defaults(shards=1)
    tool = add("average", _average, "write the mean of the models of several checkpoints")
    tool.add_argument("paths", type=Path, nargs="*", metavar="path")
    tool.add_argument(
        "--last", nargs=2, metavar=("N", "DIR"), help="the last N saves in a directory, instead of paths"
    )
    tool.add_argument("--to", type=Path, required=True, metavar="OUT.pt")
    tool = add(
        "to-dense", _to_dense, "write a dense checkpoint that stock fairseq loads without this package"
    )
    tool.add_argument("path", type=Path)
    tool.add_argument("--to", type=Path, required=True, metavar="OUT.pt")
    choice = tool.add_mutually_exclusive_group(required=True)
    choice.add_argument("--expert", type=int, metavar="J", help="the expert that every MoE layer becomes")
    choice.add_argument("--mean", action="store_true", help="the mean of a layer's experts instead")
    return parser


def _add_copy_arguments(tool: argparse.ArgumentParser) -> None:
    tool.add_argument("path", type=Path)
    tool.add_argument("--to", type=Path, required=True, metavar="OUT.pt", help="main file of the copy")
    tool.add_argument("--no-optimizer", action="store_true", help="leave out optimizer state")
