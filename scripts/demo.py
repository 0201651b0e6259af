"""``make demo``: from raw text to a trained, evaluated, sampled and inspected MoE language model on CPU.

Prepares text (Python's own standard library, or --text FILE), then runs fairseq's real commands and prints
each: preprocess; train a small MoE model on two ranks; train the dense model of equal active FLOPs on the
same tokens with the same settings; evaluate; sample; draw the load of the experts. All goes into ``demo/``.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

ROOT = Path(__file__).resolve().parents[1]
WORK = Path("demo")  # under ROOT, where every command runs

UPDATES = 300
EMBED_DIM, FFN_DIM, EXPERTS, TOP_K = 128, 512, 8, 2
# A token passes TOP_K experts and the router, whose E x D products are those of E / 2 more hidden units.
EQUAL_FLOPS_FFN_DIM = TOP_K * FFN_DIM + EXPERTS // 2

VOCABULARY = 2000
TOKENIZER_SAMPLE_CHARS = 1_000_000
MAX_TEXT_CHARS = 4_000_000
# Every 20th document is held out. Documents of a --text FILE are slices of this size.
HELD_OUT_EVERY = 20
SLICE_CHARS = 20_000
# Packages of the standard library whose files are prose in Python, not tables.
PACKAGES = (
    ".",
    "asyncio",
    "collections",
    "concurrent/futures",
    "ctypes",
    "email",
    "html",
    "http",
    "importlib",
    "json",
    "logging",
    "multiprocessing",
    "sqlite3",
    "tkinter",
    "unittest",
    "urllib",
    "wsgiref",
    "xml/dom",
)
NEWLINE = "<n>"
_UNPRINTABLE = re.compile(r"[^\S ]|[\x00-\x1f]")
COMMAND_TIMEOUT_SEC = 900

TRAINING = [
    *("--user-dir", "fairseq_moe", "--cpu", "--distributed-world-size", "2"),
    *("--task", "language_modeling", "--tokens-per-sample", "128", "--sample-break-mode", "none"),
    *("--arch", "transformer_lm_gpt", "--share-decoder-input-output-embed"),
    *("--decoder-layers", "4", "--decoder-embed-dim", str(EMBED_DIM)),
    *("--decoder-ffn-embed-dim", str(FFN_DIM), "--decoder-attention-heads", "4"),
    *("--dropout", "0.0", "--attention-dropout", "0.0", "--batch-size", "8"),
    *("--optimizer", "adam", "--adam-betas", "(0.9, 0.98)", "--clip-norm", "1.0", "--seed", "1"),
    *("--lr", "0.004", "--lr-scheduler", "polynomial_decay", "--warmup-updates", "40"),
    *("--no-epoch-checkpoints", "--num-workers", "0", "--log-format", "json"),
]
MOE = [
    *("--moe-freq", "2", "--moe-expert-count", str(EXPERTS)),
    *("--moe-gating-use-fp32", "--moe-second-expert-policy", "all"),
    *(
        "--criterion",
        "moe_cross_entropy",
        "--moe-gate-loss-wt",
        "0.01",
        "--moe-gate-loss-combine-method",
        "sum",
    ),
]
DENSE = [
    *("--moe-freq", "2", "--alternate-decoder-ffn-embed-dim", str(EQUAL_FLOPS_FFN_DIM)),
    *("--criterion", "cross_entropy"),
]


def main() -> int:
    """Run the demo; the exit code is that of the first command that fails."""
    parser = argparse.ArgumentParser(description="From raw text to a trained MoE language model, on CPU.")
    parser.add_argument("--text", type=Path, help="your own UTF-8 text (default: Python's standard library)")
    parser.add_argument("--updates", type=int, default=UPDATES, help="training budget (default: %(default)s)")
    args = parser.parse_args()
    text = None if args.text is None else args.text.resolve()
    if args.updates < 1:
        parser.error(f"--updates is {args.updates}, expected at least 1")
    os.chdir(ROOT)
    _prepare_commands()
    try:
        _demo(text, args.updates)
    except DemoError as error:
        print(f"\ndemo: {error}", file=sys.stderr)
        return 1
    return 0


class DemoError(Exception):
    """One sentence for the user."""


def _demo(text: Path | None, updates: int) -> None:
    start_sec = time.monotonic()
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir()
    prompt = prepare_text(text)
    heading("numbers: fairseq-preprocess")
    run(
        *("fairseq-preprocess", "--only-source", "--srcdict", f"{WORK}/dict.txt"),
        *(
            "--trainpref",
            f"{WORK}/train.txt",
            "--validpref",
            f"{WORK}/valid.txt",
            "--destdir",
            f"{WORK}/bin",
            "--workers",
            "2",
        ),
    )
    heading(f"mixture of experts: 2 ranks, {EXPERTS} experts in every 2nd layer, {TOP_K} per token")
    moe = train("moe", MOE, updates)
    heading(f"the dense model of equal active FLOPs: the same layers are {EQUAL_FLOPS_FFN_DIM} wide")
    dense = train("dense", DENSE, updates)
    heading("evaluation: fairseq-eval-lm, one process that loads the experts of both ranks")
    run(
        *("fairseq-eval-lm", f"{WORK}/bin", "--user-dir", "fairseq_moe", "--cpu", "--gen-subset", "valid"),
        *("--path", f"{WORK}/moe/checkpoint_last.pt", "--batch-size", "16", "--tokens-per-sample", "128"),
        show=lambda line: (
            line.partition("| INFO | fairseq_cli.eval_lm | ")[2] if "Perplexity" in line else ""
        ),
    )
    heading("a sampled continuation: fairseq-interactive")
    sample(prompt)
    heading("the load of the experts: fairseq_moe.inspect")
    run(
        *("python", "-W", "ignore", "-m", "fairseq_moe.inspect", f"{WORK}/moe", "--png", f"{WORK}/load.png"),
        show=lambda line: line,
    )
    compare(moe, dense)
    print(f"\nEverything is in {WORK}/. Wall time: {time.monotonic() - start_sec:.0f} s.")


# --- text ---------------------------------------------------------------------------------------------------


def prepare_text(source: Path | None) -> str:
    """Write train.txt and valid.txt in pieces, one paragraph per line, and dict.txt; return a prompt."""
    heading("text: " + ("Python's standard library" if source is None else str(source)))
    documents = list(_library() if source is None else _slices(source))
    valid = documents[::HELD_OUT_EVERY]
    train = [document for index, document in enumerate(documents) if index % HELD_OUT_EVERY]
    if not train:
        raise DemoError(f"{source} is too short, expected at least {2 * SLICE_CHARS:,} characters.")
    tokenizer = _train_tokenizer(train)
    pieces = [
        tokenizer.id_to_piece(index) for index in range(3, tokenizer.vocab_size())
    ]  # <unk>, <s>, </s> first
    (WORK / "dict.txt").write_text("".join(f"{piece} 1\n" for piece in pieces), encoding="utf-8")
    for name, part in (("train", train), ("valid", valid)):
        lines = [_pieces(tokenizer, paragraph) for document in part for paragraph in _paragraphs(document)]
        (WORK / f"{name}.txt").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        num_pieces = sum(line.count(" ") + 1 for line in lines)
        print(f"{name}: {len(part)} documents, {len(lines):,} paragraphs, {num_pieces:,} pieces")
    if source is None:
        return f"def read(self, size=-1):{NEWLINE}    "
    words = valid[0].split()
    return " ".join(words[:8])


def _library() -> Iterator[str]:
    """Python files, in the order of their names."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left = MAX_TEXT_CHARS
    for path in sorted(path for package in PACKAGES for path in (root / package).glob("*.py")):
        text = path.read_text(encoding="utf-8", errors="ignore")
        left -= len(text)
        if left < 0:
            return
        yield text


def _slices(source: Path) -> Iterator[str]:
    """A file cut between paragraphs, or between lines where paragraphs are longer than a slice."""
    try:
        text = source.read_text(encoding="utf-8", errors="replace")[:MAX_TEXT_CHARS]
    except OSError as error:
        raise DemoError(f"the text {source} cannot be read: {error.strerror}.") from None
    start = 0
    while start < len(text):
        end = start + SLICE_CHARS
        for separator in ("\n\n", "\n", " "):
            cut = text.rfind(separator, start + 1, end)
            if cut > 0 and end < len(text):
                end = cut
                break
        yield text[start:end]
        start = end


def _paragraphs(document: str) -> Iterator[str]:
    """Blocks between blank lines as one line each; a newline within becomes a symbol, so that it is learned."""
    for block in re.split(r"\n\s*\n", document):
        lines = [
            re.sub(r"[^\S ]|[^\x20-\U0010ffff]", " ", line.expandtabs(4)).rstrip()
            for line in block.split("\n")
        ]
        if any(lines):
            yield NEWLINE.join(line for line in lines if line)


def _train_tokenizer(documents: Sequence[str]) -> SentencePieceProcessor:
    every = sum(map(len, documents)) // TOKENIZER_SAMPLE_CHARS + 1
    SentencePieceTrainer.train(
        sentence_iterator=(
            paragraph for document in documents[::every] for paragraph in _paragraphs(document)
        ),
        model_prefix=str(WORK / "spm"),
        model_type="bpe",
        vocab_size=VOCABULARY,
        hard_vocab_limit=False,
        user_defined_symbols=[NEWLINE],
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        max_sentence_length=100_000,
        num_threads=2,
        minloglevel=2,
    )
    return SentencePieceProcessor(model_file=str(WORK / "spm.model"))


def _pieces(tokenizer: SentencePieceProcessor, paragraph: str) -> str:
    """Pieces between blanks. By way of their ids, so that an unknown character is <unk>, for fairseq too."""
    return " ".join(tokenizer.id_to_piece(tokenizer.encode(paragraph)))


# --- commands -----------------------------------------------------------------------------------------------


@dataclass
class Training:
    """What a training run logged.

    Args:
        perplexities: of the held-out text, by update.
        parameters: of the model, over all ranks.
        tokens_per_sec: over the whole run, validation left out.
        drop_rate: % of the assignments that found no place, at the end; None for a dense model.
    """

    perplexities: dict[int, float] = field(default_factory=dict)
    parameters: int = 0
    tokens_per_sec: float = 0.0
    drop_rate: float | None = None


def train(name: str, flags: list[str], updates: int) -> Training:
    """Train with the common settings and these flags, printing each validation."""
    training = Training()
    interval = max(updates // 5, 1)

    def show(line: str) -> str:
        kind, _, text = line.partition("| INFO | ")[2].partition(" | ")
        if kind == "fairseq_cli.train" and " model params: " in text:
            counted = re.match(r"num\. (shared|non-expert|expert) model params: ([\d,]+)", text)
            if counted is not None:
                share = int(counted.group(2).replace(",", ""))
                training.parameters += 2 * share if counted.group(1) == "expert" else share
            return text
        if kind not in ("train", "valid") or not text.startswith("{"):
            return ""
        stats = json.loads(text)
        if kind == "train":
            training.tokens_per_sec = float(stats["train_wps"])
            return ""
        update, perplexity = int(stats["valid_num_updates"]), float(stats["valid_ppl"])
        training.perplexities[update] = perplexity
        training.drop_rate = float(stats["valid_drop_rate"]) if "valid_drop_rate" in stats else None
        return f"update {update:4d}  valid perplexity {perplexity:8.2f}"

    run(
        *("fairseq-train", f"{WORK}/bin", *TRAINING, *flags, "--save-dir", f"{WORK}/{name}"),
        *("--max-update", str(updates), "--total-num-update", str(updates)),
        *("--validate-interval-updates", str(interval), "--log-interval", str(interval)),
        show=show,
    )
    if not training.perplexities:
        raise DemoError(f"{WORK}/{name} was not validated once; see the log.")
    return training


def sample(prompt: str) -> None:
    """Continue the prompt and print it as the text it stands for."""
    tokenizer_flags = ("--bpe", "sentencepiece", "--sentencepiece-model", f"{WORK}/spm.model")
    found: list[str] = []

    def show(line: str) -> str:
        if line.startswith("D-"):
            found.append(line.rstrip("\n").split("\t")[2])
        return ""

    run(
        *("fairseq-interactive", f"{WORK}/bin", "--user-dir", "fairseq_moe", "--cpu"),
        *("--task", "language_modeling", "--path", f"{WORK}/moe/checkpoint_last.pt", *tokenizer_flags),
        *("--sampling", "--sampling-topp", "0.8", "--beam", "1", "--max-len-b", "120", "--seed", "3"),
        show=show,
        given=prompt,
    )
    for text in found:
        print("\n" + "\n".join("    " + line for line in text.replace(NEWLINE, "\n").split("\n")))


def run(*command: str, show: Callable[[str], str] = lambda line: "", given: str | None = None) -> None:
    """Print a command, run it, print what ``show`` makes of its lines; all of its output goes to a log.

    Args:
        command: program and arguments; ``python`` is this interpreter.
        show: text to print for a line of output, or nothing.
        given: a line for its standard input.

    Raises:
        DemoError: it failed; its last lines have been printed.
    """
    prefix = f"echo {shlex.quote(given)} | " if given is not None else ""
    print(f"\n$ {prefix}{shlex.join(command)}\n", flush=True)
    program = sys.executable if command[0] == "python" else shutil.which(command[0])
    if program is None:
        raise DemoError(f"{command[0]} is not installed beside {sys.executable}; see README.md.")
    path = WORK / f"{len(list(WORK.glob('*.log')))}-{Path(command[0]).name}.log"
    last_lines: deque[str] = deque(maxlen=30)
    process = subprocess.Popen(
        [program, *command[1:]],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    signal.alarm(COMMAND_TIMEOUT_SEC)
    try:
        process.stdin.write("" if given is None else given + "\n")
        process.stdin.close()
        with path.open("w", encoding="utf-8") as log:
            for line in process.stdout:
                log.write(line)
                last_lines.append(line)
                text = show(line)
                if text:
                    print(text.rstrip("\n"), flush=True)
        code = process.wait()
    finally:
        signal.alarm(0)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    if code != 0:
        print("".join(last_lines), file=sys.stderr)
        raise DemoError(f"{command[0]} ended with exit code {code}; its whole output is in {path}.")


def _prepare_commands() -> None:
    """Put this interpreter's scripts first on PATH; end a command that hangs, or when we are told to end."""
    os.environ["PATH"] = sysconfig.get_path("scripts") + os.pathsep + os.environ["PATH"]
    os.environ.setdefault("OMP_NUM_THREADS", "1")

    def too_long(signum: int, frame: object) -> None:
        raise DemoError(f"a command took more than {COMMAND_TIMEOUT_SEC} s and was ended.")

    signal.signal(signal.SIGALRM, too_long)
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))


def heading(text: str) -> None:
    """Print the title of a step."""
    print(f"\n=== {text}", flush=True)


def compare(moe: Training, dense: Training) -> None:
    """Print both runs side by side."""
    heading("the same tokens, the same updates, the same FLOPs per token")
    print(f"{'':>16} {'MoE':>12} {'dense':>12}")
    for update in sorted(moe.perplexities):
        print(
            f"{'update ' + str(update):>16} {moe.perplexities[update]:12.2f} {dense.perplexities[update]:12.2f}"
        )
    print(f"{'parameters':>16} {moe.parameters:12,} {dense.parameters:12,}")
    print(f"{'tokens/s':>16} {moe.tokens_per_sec:12,.0f} {dense.tokens_per_sec:12,.0f}")
    last = max(moe.perplexities)
    change = 100 * (1 - moe.perplexities[last] / dense.perplexities[last])
    word = "lower" if change > 0 else "higher"
    print(f"\nValid perplexity of the MoE model: {abs(change):.1f} % {word} than the dense model's.")


if __name__ == "__main__":
    sys.exit(main())
