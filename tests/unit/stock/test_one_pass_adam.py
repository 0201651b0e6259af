"""Models with experts step Adam in one pass on a GPU; here by Triton's interpreter, inside fairseq's own Trainer."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.ranks import run_ranks

PRECISIONS = {
    "fp32": [],
    "fp16": ["--fp16", "--fp16-no-flatten-grads"],
    "memory-efficient-fp16": ["--memory-efficient-fp16"],
    "bf16": ["--bf16"],
    "memory-efficient-bf16": ["--memory-efficient-bf16"],
}
ADAM = ["--optimizer", "adam", "--adam-betas", "(0.9, 0.98)", "--lr", 0.01, "--clip-norm", 0.5]
MOE = ["--moe-expert-count", 2, "--moe-gating-use-fp32", "--ddp-backend", "legacy_ddp"]
NUM_UPDATES = 5
FSDP = ["--moe-expert-count", 2, "--moe-gating-use-fp32", "--ddp-backend", "fully_sharded"]


def _open_kernels_to_cpu(is_open: bool) -> None:
    """Open the optimizers' kernels alone: the model's would round in their own way."""
    from fairseq_moe.fused import adam
    from fairseq_moe.optim import half_adam, one_pass_adam

    if is_open:
        for module in (adam, half_adam, one_pass_adam):
            module.runs_triton = lambda *tensors: all(t.dtype != torch.float64 for t in tensors)


def _train(rank: int, flags: list[Any], is_open: bool, num_updates: int = NUM_UPDATES) -> dict[str, Any]:
    from tests.helpers.tiny import build_trainer, make_batch, update

    _open_kernels_to_cpu(is_open)
    trainer = build_trainer([*ADAM, *flags])
    logs = [update(trainer, [make_batch(seed), make_batch(seed + 50)]) for seed in range(num_updates)]
    model = trainer.get_model()
    return {
        "kind": type(trainer.optimizer.optimizer).__name__,
        "logs": [{name: log.get(name) for name in ("loss", "gnorm", "clip", "lr")} for log in logs],
        # A bias of keys has no gradient but rounding, which Adam makes steps of.
        "parameters": {
            name: p.detach().float().numpy()
            for name, p in model.named_parameters()
            if "k_proj.bias" not in name
        },
        "state": sorted(next(iter(trainer.optimizer.optimizer.state.values()))),
    }


def _train_both(rank: int, flags: list[Any], num_updates: int = NUM_UPDATES) -> list[dict[str, Any]]:
    return [_train(rank, flags, is_open, num_updates) for is_open in (False, True)]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_training_is_that_of_stock(precision: str) -> None:
    pytest.importorskip("triton")
    flags = [*MOE, *PRECISIONS[precision]]
    stock, ours = run_ranks(_train_both, 1, flags)[0]
    assert (stock["kind"], ours["kind"]) == ("Adam", "OnePassAdam")
    assert stock["state"] == ours["state"]
    # Half-precision gradients are no longer rounded after each multiplication; the interpreter cuts bfloat16 off.
    loose = {"bf16": 1e-2, "memory-efficient-fp16": 2e-2, "memory-efficient-bf16": 6e-2}
    tolerance = {"fp32": 1e-5, "fp16": 1e-3, **loose}[precision]
    for expected, found in zip(stock["logs"], ours["logs"], strict=True):
        assert found == pytest.approx(expected, rel=tolerance)
    assert any(log["clip"] for log in ours["logs"])
    for name, expected in stock["parameters"].items():
        found = torch.from_numpy(ours["parameters"][name])
        torch.testing.assert_close(found, torch.from_numpy(expected), atol=tolerance, rtol=tolerance)


@pytest.mark.slow
def test_fifty_updates_have_the_losses_of_stock() -> None:
    pytest.importorskip("triton")
    stock, ours = run_ranks(_train_both, 1, MOE, 50)[0]
    assert (stock["kind"], ours["kind"]) == ("Adam", "OnePassAdam")
    losses, expected = ([log["loss"] for log in run["logs"]] for run in (ours, stock))
    assert losses == pytest.approx(expected, rel=1e-5)
    assert expected[-1] < 0.9 * expected[0]


@pytest.mark.parametrize(
    ("flags", "kind", "tolerance"),
    [
        (MOE, "OnePassAdam", 1e-5),
        (FSDP, "OnePassAdam", 1e-5),
        ([*FSDP, "--fp16"], "OnePassAdam", 1e-3),
        ([*FSDP, "--memory-efficient-fp16"], "OnePassAdam", 2e-2),
        ([*FSDP, "--memory-efficient-fp16", "--fp16-adam-stats"], "HalfAdam", 2e-2),
    ],
    ids=["legacy_ddp", "fp32", "fp16", "memory-efficient-fp16", "fp16-adam-stats"],
)
def test_ranks_and_shards_are_stepped_as_by_stock(flags: list[Any], kind: str, tolerance: float) -> None:
    pytest.importorskip("triton")
    for expected, found in run_ranks(_train_both, 2, flags):
        assert found["kind"] == kind
        for log, stock_log in zip(found["logs"], expected["logs"], strict=True):
            assert log == pytest.approx(stock_log, rel=tolerance)


def test_dense_models_keep_their_optimizer() -> None:
    pytest.importorskip("triton")
    (found,) = run_ranks(_train, 1, ["--moe-freq", 0], True)
    assert found["kind"] == "Adam"


@pytest.mark.parametrize(
    ("model", "precision"), [("dense", "fp32"), ("experts", "fp32"), ("experts", "memory-efficient-fp16")]
)
def test_half_precision_adam_sees_the_norm_that_its_slow_path_sees(model: str, precision: str) -> None:
    pytest.importorskip("triton")
    flags = ["--fp16-adam-stats", *PRECISIONS[precision], *(MOE if model == "experts" else ["--moe-freq", 0])]
    slow, fast = run_ranks(_train_both, 1, flags)[0]
    assert slow["kind"] == fast["kind"] == "HalfAdam"
    for expected, found in zip(slow["logs"], fast["logs"], strict=True):
        assert found == pytest.approx(expected, rel=0.01)


def _skip(rank: int, flags: list[Any], is_open: bool) -> dict[str, Any]:
    """Spoil one gradient: the update is skipped, and nothing of its factor may be left for the next one."""
    from tests.helpers.tiny import build_trainer, make_batch, update

    _open_kernels_to_cpu(is_open)
    logs = []
    for is_spoilt in (False, True):
        trainer = build_trainer([*ADAM, *MOE, *flags])
        if is_spoilt:
            first = next(trainer.get_model().parameters())
            handle = first.register_hook(lambda grad: grad * float("nan"))
            assert update(trainer, [make_batch(1)]) == {}
            handle.remove()
        logs.append(update(trainer, [make_batch(1)]))
    return {"kind": type(trainer.optimizer.optimizer).__name__, "norms": [log["gnorm"] for log in logs]}


@pytest.mark.parametrize(("precision", "is_open"), [*((each, True) for each in PRECISIONS), ("bf16", False)])
def test_a_skipped_update_leaves_no_factor_behind(precision: str, is_open: bool) -> None:
    pytest.importorskip("triton")
    (found,) = run_ranks(_skip, 1, PRECISIONS[precision], is_open)
    assert found["kind"] == ("OnePassAdam" if is_open else "Adam")
    assert found["norms"][1] == found["norms"][0] > 0


class _Passes(TorchDispatchMode):
    """Count what operators do with gradients and parameters, and copies that they make of them."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self.places = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [each for arg in args for each in (arg if isinstance(arg, list | tuple) else [arg])]
        tensors = [each for each in given if isinstance(each, Tensor)]
        hits = sum(t.untyped_storage().data_ptr() in self.places for t in tensors if t.numel() > 0)
        name = func.overloadpacket.__name__
        if hits and name not in {"detach", "view", "alias", "is_same_size"}:
            self.found[name] += hits
        return func(*args, **(kwargs or {}))


def _passes(rank: int, flags: list[Any]) -> dict[str, Any]:
    from fairseq_moe.optim import half_adam, one_pass_adam
    from tests.helpers.tiny import build_trainer, make_batch, update

    _open_kernels_to_cpu(True)
    trainer = build_trainer([*ADAM, *MOE, *flags])
    update(trainer, [make_batch(1)])
    optimizer = trainer.optimizer
    copies = getattr(optimizer, "fp32_params", None)
    found: dict[str, Any] = {"steps": 0}
    multiply, reduced = optimizer.multiply_grads, []
    steps = [(one_pass_adam, "adam_step_"), (half_adam, "half_adam_step_")]

    def begin(c: Any) -> None:  # stock multiplies by the sample size first
        grads = [p.grad for p in (*trainer.get_model().parameters(), *(copies or [])) if p.grad is not None]
        found["gradients"] = len([p for p in trainer.get_model().parameters() if p.grad is not None])
        reduced.append(_Passes([*grads, *(copies or []), *trainer.get_model().parameters()]))
        reduced[0].__enter__()
        multiply(c)

    def counting(step: Callable[..., None]) -> Callable[..., None]:
        def counted(*args: Any, **kwargs: Any) -> None:
            found["steps"] += 1
            reduced[0].__exit__(None, None, None)  # the interpreter copies what it is given
            step(*args, **kwargs)
            reduced[0].__enter__()

        return counted

    optimizer.multiply_grads = begin
    for module, name in steps:
        setattr(module, name, counting(getattr(module, name)))
    trainer.train_step([make_batch(2)])
    reduced[0].__exit__(None, None, None)
    return {**found, "passes": dict(reduced[0].found)}


@pytest.mark.parametrize(
    ("adam", "precision"), [*(("Adam", each) for each in PRECISIONS), ("HalfAdam", "memory-efficient-bf16")]
)
def test_a_gradient_is_read_by_its_norm_and_by_the_step(adam: str, precision: str) -> None:
    pytest.importorskip("triton")
    flags = [*PRECISIONS[precision], *(["--fp16-adam-stats"] if adam == "HalfAdam" else [])]
    (found,) = run_ranks(_passes, 1, flags)
    number = found["gradients"]
    assert found["steps"] == number > 10
    # The half-precision state is scaled by the largest gradient, which is looked for first.
    assert found["passes"] == {"_foreach_norm": number if adam == "Adam" else 2 * number}
