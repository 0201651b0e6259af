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
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from demo_text import NEWLINE, DemoError, prepare_text

ROOT = Path(__file__).resolve().parents[1]
WORK = Path("demo")  # under ROOT, where every command runs

UPDATES = 120
RANKS = 2
EMBED_DIM, FFN_DIM, EXPERTS, TOP_K = 128, 512, 8, 2
# A token passes TOP_K experts and the router, whose E x D products are those of E / 2 more hidden units.
EQUAL_FLOPS_FFN_DIM = TOP_K * FFN_DIM + EXPERTS // 2

COMMAND_TIMEOUT_SEC = 900

TRAINING = f"""
    --user-dir fairseq_moe --cpu --distributed-world-size {RANKS}
    --task language_modeling --tokens-per-sample 128 --sample-break-mode none
    --arch transformer_lm_gpt --share-decoder-input-output-embed --decoder-layers 4
    --decoder-embed-dim {EMBED_DIM} --decoder-ffn-embed-dim {FFN_DIM} --decoder-attention-heads 4
    --dropout 0.0 --attention-dropout 0.0 --batch-size 8
    --optimizer adam --adam-betas '(0.9, 0.98)' --clip-norm 1.0 --seed 1
    --lr 0.004 --lr-scheduler polynomial_decay --warmup-updates 40
    --no-epoch-checkpoints --num-workers 0 --log-format json
"""
MOE = f"""
    --moe-freq 2 --moe-expert-count {EXPERTS} --moe-gating-use-fp32 --moe-second-expert-policy all
    --moe-eval-capacity-token-fraction 1.0
    --criterion moe_cross_entropy --moe-gate-loss-wt 0.01 --moe-gate-loss-combine-method sum
"""
DENSE = f"""
    --moe-freq 2 --alternate-decoder-ffn-embed-dim {EQUAL_FLOPS_FFN_DIM} --criterion cross_entropy
"""


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


def _demo(text: Path | None, updates: int) -> None:
    start_sec = time.monotonic()
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir()
    heading("text: " + ("Python's standard library" if text is None else str(text)))
    prompt = prepare_text(text, work=WORK)
    heading("numbers: fairseq-preprocess")
    run(
        f"fairseq-preprocess --only-source --srcdict {WORK}/dict.txt --trainpref {WORK}/train.txt "
        f"--validpref {WORK}/valid.txt --destdir {WORK}/bin --workers 2"
    )
    heading(f"mixture of experts: 2 ranks, {EXPERTS} experts in every 2nd layer, {TOP_K} per token")
    moe = train("moe", MOE, updates)
    heading(f"the dense model of equal active FLOPs: the same layers are {EQUAL_FLOPS_FFN_DIM} wide")
    dense = train("dense", DENSE, updates)
    heading("evaluation: fairseq-eval-lm, one process that loads the experts of both ranks")
    run(
        f"fairseq-eval-lm {WORK}/bin --user-dir fairseq_moe --cpu --gen-subset valid --path "
        f"{WORK}/moe/checkpoint_last.pt --batch-size 16 --tokens-per-sample 128",
        show=lambda line: (
            line.partition("fairseq_cli.eval_lm")[2].lstrip(" |:INFO") if "Perplexity" in line else ""
        ),
    )
    heading("a sampled continuation: fairseq-interactive")
    sample(prompt)
    heading("the load of the experts: fairseq_moe.inspect")
    run(
        f"python -W ignore -m fairseq_moe.inspect {WORK}/moe --png {WORK}/load.png",
        show=lambda line: "" if line.startswith("INFO:") else line,  # what importing fairseq says
    )
    compare(moe, dense)
    print(f"\nEverything is in {WORK}/. Wall time: {time.monotonic() - start_sec:.0f} s.")


@dataclass
class Training:
    """What a training run logged.

    Args:
        perplexities: of the held-out text, by update.
        parameters: of the experts of all ranks, and of all else.
        tokens_per_sec: over the whole run.
    """

    perplexities: dict[int, float] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    tokens_per_sec: float = 0.0

    def count(self, text: str) -> str:
        """Note a "num. ... model params" line; experts are those of one of the two ranks."""
        kind = "expert" if " expert " in text else "dense"
        size = int(re.sub(r"\D", "", text.partition("params: ")[2].partition(" ")[0]))
        if kind in self.parameters:
            return ""
        self.parameters[kind] = size * RANKS if kind == "expert" else size
        return text


def train(name: str, flags: str, updates: int) -> Training:
    """Train with the common settings and these flags, printing each validation."""
    training = Training()
    interval = max(updates // 5, 1)

    def show(line: str) -> str:
        kind, _, text = line.partition("| INFO | ")[2].partition(" | ")
        if " model params: " in text:
            return training.count(text)
        if kind not in ("train", "valid") or not text.startswith("{"):
            return ""
        stats = json.loads(text)
        if kind == "train":
            training.tokens_per_sec = float(stats["train_wps"])
            return ""
        update, perplexity = int(stats["valid_num_updates"]), float(stats["valid_ppl"])
        training.perplexities[update] = perplexity
        return f"update {update:4d}  valid perplexity {perplexity:8.2f}"

    run(
        f"fairseq-train {WORK}/bin {TRAINING} {flags} --save-dir {WORK}/{name} --max-update {updates} "
        f"--total-num-update {updates} --validate-interval-updates {interval} --log-interval {interval}",
        show=show,
    )
    if not training.perplexities:
        raise DemoError(f"{WORK}/{name} was not validated once; see the log.")
    return training


def sample(prompt: str) -> None:
    """Continue the prompt and print it as the text it stands for."""
    found: list[str] = []

    def show(line: str) -> str:
        if line.startswith("D-"):
            found.append(line.rstrip("\n").split("\t")[2])
        return ""

    run(
        f"fairseq-interactive {WORK}/bin --user-dir fairseq_moe --cpu --task language_modeling --path "
        f"{WORK}/moe/checkpoint_last.pt --bpe sentencepiece --sentencepiece-model {WORK}/spm.model "
        "--sampling --sampling-topp 0.8 --beam 1 --max-len-b 120 --seed 3",
        show=show,
        given=prompt,
    )
    for text in found:
        print("\n" + "\n".join("    " + line for line in text.replace(NEWLINE, "\n").split("\n")))


def run(line: str, *, show: Callable[[str], str] = lambda line: "", given: str | None = None) -> None:
    """Print a command, run it, print what ``show`` makes of its lines; all of its output goes to a log.

    Args:
        line: program and arguments as in a shell; ``python`` is this interpreter.
        show: text to print for a line of its output, or nothing.
        given: a line for its standard input.

    Raises:
        DemoError: it failed; its last lines have been printed.
    """
    command = shlex.split(line)
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
            for printed in process.stdout:
                log.write(printed)
                last_lines.append(printed)
                text = show(printed)
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
    for update, perplexity in sorted(moe.perplexities.items()):
        print(f"{f'update {update}':>16} {perplexity:12.2f} {dense.perplexities[update]:12.2f}")
    print(f"{'parameters':>16} {sum(moe.parameters.values()):12,} {sum(dense.parameters.values()):12,}")
    print(f"{'tokens/s':>16} {moe.tokens_per_sec:12,.0f} {dense.tokens_per_sec:12,.0f}")
    last = max(moe.perplexities)
    change = 100 * (1 - moe.perplexities[last] / dense.perplexities[last])
    word = "lower" if change > 0 else "higher"
    print(f"\nValid perplexity of the MoE model: {abs(change):.1f} % {word} than the dense model's.")


if __name__ == "__main__":
    sys.exit(main())
