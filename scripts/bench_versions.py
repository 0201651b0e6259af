"""Time of MoE layers on CPU in two checkouts of this project, side by side: has a change made anything slower?

    python scripts/bench_versions.py OLD NEW [--rounds 21]

One process for each checkout; rounds take turns, and so does who begins. A ratio is new by old within a round, by this
process's CPU time on one thread. Prints the median ratio of each case, and the middle half of its rounds.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

CASES = {
    "8 experts of 256 x 1024, 1024 tokens": "local gelu 256 1024 8 2 1024 float32",
    "the same in bfloat16": "local gelu 256 1024 8 2 1024 bfloat16",
    "32 gated experts of 128 x 256, 4 per token": "local swiglu 128 256 32 4 1024 float32",
    "8 experts of 256 x 512 by all-to-all": "alltoall gelu 256 512 8 2 1024 float32",
    "8 padded experts of 64 x 128, 128 tokens": "padded gelu 64 128 8 2 128 float32",
}
_STEPS = 4  # of a round


def serve() -> None:
    """Time the cases that are asked for on standard input."""
    import torch
    import torch.nn.functional as F

    from fairseq_moe import modules
    from fairseq_moe.modules.dispatch.exchange import LocalExchange
    from fairseq_moe.modules.dispatch.padded import plan_padded
    from fairseq_moe.modules.kernels.swiglu import swiglu
    from fairseq_moe.modules.routing.scores import ScoreRule
    from fairseq_moe.modules.routing.topk import CapacityConfig

    torch.set_num_threads(1)

    def step_of(case: str) -> Any:
        way, activation, *numbers, dtype_name = case.split()
        width, hidden, experts, top_k, tokens = map(int, numbers)
        dtype = getattr(torch, dtype_name)
        options: dict[str, Any] = {"aux_losses": frozenset({"aux"})}
        if way == "padded":
            options["capacity"] = CapacityConfig(factor=1.0, max_tokens=tokens)
        dispatcher = {
            "local": modules.LocalDispatcher,
            "alltoall": lambda: modules.AllToAllDispatcher(LocalExchange()),
            "padded": lambda: modules.LocalDispatcher(plan=plan_padded),
        }[way]()
        torch.manual_seed(0)
        config = modules.TopKConfig(score=ScoreRule(top_k=top_k), **options)
        layer = modules.MoELayer(
            router=modules.Router(model_dim=width, num_experts=experts, config=config),
            experts=modules.Experts(
                num_local_experts=experts,
                first_expert_id=0,
                model_dim=width,
                hidden_dim=hidden,
                activation=F.gelu if activation == "gelu" else swiglu,
            ),
            dispatcher=dispatcher,
        ).to(dtype)
        x = torch.randn(tokens, width).to(dtype).requires_grad_()
        info = modules.TokenInfo(mode=modules.RouterMode.TRAIN)

        def step() -> None:
            layer.zero_grad(set_to_none=True)
            x.grad = None
            y, aux = layer(x, tokens=info)
            (y.sum() + aux.losses.sum()).backward()

        return step

    steps: dict[str, Any] = {}
    for line in sys.stdin:
        case = line.strip()
        steps[case] = steps.get(case) or step_of(case)
        start = time.process_time()
        for _ in range(_STEPS):
            steps[case]()
        print(json.dumps(time.process_time() - start), flush=True)


class Checkout:
    """A process that times the layers of one checkout."""

    def __init__(self, path: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, "--serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
            cwd=path,
        )

    def seconds(self, case: str) -> float:
        """CPU time of one round."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(case + "\n")
        self.process.stdin.flush()
        return float(json.loads(self.process.stdout.readline()))


def main() -> int:
    """Compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkouts", nargs="*", type=Path, metavar="OLD NEW")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve()
        return 0
    if len(args.checkouts) != 2 or not all((path / "fairseq_moe").is_dir() for path in args.checkouts):
        parser.error("give two checkouts of this project, the old one first")
    old, new = (Checkout(path.resolve()) for path in args.checkouts)
    print("| case | new / old, median | middle half |\n|---|--:|--:|")
    for name, case in CASES.items():
        for checkout in (old, new):
            checkout.seconds(case)
        ratios = []
        for number in range(args.rounds):
            order = (old, new) if number % 2 else (new, old)
            spent = {id(checkout): checkout.seconds(case) for checkout in order}
            ratios.append(spent[id(new)] / spent[id(old)])
        low, median, high = statistics.quantiles(ratios, n=4)
        print(f"| {name} | {median:.3f} | {low:.3f} to {high:.3f} |", flush=True)
    for checkout in (old, new):
        checkout.process.kill()
    return 0


if __name__ == "__main__":
    sys.exit(main())
