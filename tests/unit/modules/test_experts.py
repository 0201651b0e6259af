"""Stacked experts: initialisation, gradients of experts without rows, and marks that survive copies."""

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fairseq_moe.modules import experts as module
from fairseq_moe.modules.dispatch.rows import ExpertWork
from fairseq_moe.modules.experts import Experts
from fairseq_moe.modules.kernels.swiglu import ClampedSwiglu, is_gated, swiglu
from fairseq_moe.modules.parts import part_slices
from fairseq_moe.parallel.placement import expert_placements

SHAPES = {"fc1_weight": (3, 8, 4), "fc1_bias": (3, 8), "fc2_weight": (3, 4, 8), "fc2_bias": (3, 4)}


def make(num_local: int = 3, first: int = 0, seed: int = 5, **kwargs: float | None) -> Experts:
    return Experts(
        num_local_experts=num_local,
        first_expert_id=first,
        model_dim=4,
        hidden_dim=8,
        activation=F.gelu,
        seed=seed,
        marks={name: {"expert": True} for name in ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")},
        **kwargs,
    )


def linears(seed: int) -> tuple[nn.Linear, nn.Linear]:
    """An expert as the moe branch builds it: two Linear modules under one seed."""
    torch.manual_seed(seed)
    return nn.Linear(4, 8), nn.Linear(8, 4)


class TestInitialisation:
    def test_each_expert_is_a_pair_of_linears_under_its_own_seed(self) -> None:
        experts = make(num_local=3, first=2, seed=100)
        for local in range(3):
            fc1, fc2 = linears(100 + 2 + local)
            assert torch.equal(experts.fc1_weight[local], fc1.weight)
            assert torch.equal(experts.fc1_bias[local], fc1.bias)
            assert torch.equal(experts.fc2_weight[local], fc2.weight)
            assert torch.equal(experts.fc2_bias[local], fc2.bias)

    @pytest.mark.parametrize("num_ranks", [1, 2, 4])
    def test_spread_over_ranks_changes_nothing(self, num_ranks: int) -> None:
        whole = make(num_local=4)
        share = 4 // num_ranks
        parts = [make(num_local=share, first=rank * share) for rank in range(num_ranks)]
        for name in SHAPES:
            spread = torch.cat([getattr(part, name) for part in parts])
            assert torch.equal(spread, getattr(whole, name))

    @pytest.mark.parametrize("std", [None, 0.02])
    def test_threads_draw_the_same_numbers(self, std: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
        alone = make(num_local=9, init_std=std)
        monkeypatch.setattr(module, "_THREADED_NUMEL", 0)
        monkeypatch.setattr("os.cpu_count", lambda: 4)
        for name, value in make(num_local=9, init_std=std).named_parameters():
            assert torch.equal(value, alone.get_parameter(name))

    def test_caller_generator_is_left_alone(self) -> None:
        before = torch.get_rng_state()
        make()
        assert torch.equal(before, torch.get_rng_state())

    def test_meta_device(self) -> None:
        with torch.device("meta"):
            experts = make()
        assert all(p.is_meta and p.expert for p in experts.parameters())


class TestForward:
    def test_equals_separate_networks(self) -> None:
        experts = make(seed=1)
        counts = [3, 0, 2]
        x = torch.randn(5, 4)
        expected = []
        for local, rows in enumerate(x.split(counts)):
            fc1, fc2 = linears(1 + local)
            expected.append(fc2(F.gelu(fc1(rows))))
        torch.testing.assert_close(experts(x, ExpertWork(counts_L=counts)), torch.cat(expected))

    def test_dropout_only_while_training(self) -> None:
        experts = make(dropout=0.5, activation_dropout=0.5)
        x = torch.randn(6, 4)
        experts.eval()
        assert torch.equal(
            experts(x, ExpertWork(counts_L=[2, 2, 2])), experts(x, ExpertWork(counts_L=[2, 2, 2]))
        )
        experts.train()
        assert (experts(x, ExpertWork(counts_L=[2, 2, 2])) == 0).any()

    def test_wrong_number_of_rows_is_an_error(self) -> None:
        with pytest.raises(RuntimeError):
            make()(torch.randn(5, 4), ExpertWork(counts_L=[1, 1, 1]))

    def test_rows_of_another_dtype_are_an_error(self) -> None:
        with pytest.raises(TypeError, match=r"float32 were given rows of dtype torch\.bfloat16"):
            make()(torch.randn(3, 4).bfloat16(), ExpertWork(counts_L=[1, 1, 1]))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_autocast(self, dtype: torch.dtype) -> None:
        experts, x = make(), torch.randn(3, 4, requires_grad=True)
        half = copy.deepcopy(experts).to(dtype)
        half_x = x.detach().to(dtype).requires_grad_()
        with torch.autocast("cpu", dtype=dtype):
            y = experts(x, ExpertWork(counts_L=[1, 0, 2]))
            y.float().sum().backward()
        half_y = half(half_x, ExpertWork(counts_L=[1, 0, 2]))
        half_y.float().sum().backward()
        assert torch.equal(y, half_y) and y.dtype is dtype
        assert x.grad is not None and half_x.grad is not None
        assert torch.equal(x.grad, half_x.grad.float()) and x.grad.dtype is torch.float32
        for p, half_p in zip(experts.parameters(), half.parameters(), strict=True):
            assert p.grad is not None and half_p.grad is not None
            assert torch.equal(p.grad, half_p.grad.float())


class TestGradients:
    def test_experts_without_rows_get_zeros(self) -> None:
        experts = make()
        experts(torch.randn(4, 4), ExpertWork(counts_L=[0, 4, 0])).sum().backward()
        for name in SHAPES:
            grad = getattr(experts, name).grad
            assert grad is not None
            assert not grad[0].any() and not grad[2].any(), name
            assert grad[1].any(), name

    def test_no_rows_at_all(self) -> None:
        experts = make()
        x = torch.empty(0, 4, requires_grad=True)
        experts(x, ExpertWork(counts_L=[0, 0, 0])).sum().backward()
        assert x.grad is not None and x.grad.shape == (0, 4)
        for name, shape in SHAPES.items():
            grad = getattr(experts, name).grad
            assert grad is not None and grad.shape == shape and not grad.any()


def assert_marked(experts: Experts) -> None:
    assert {name: tuple(p.shape) for name, p in experts.named_parameters()} == SHAPES
    assert all(p.expert is True for p in experts.parameters())  # type: ignore[attr-defined]


class TestMark:
    def test_conversions(self) -> None:
        assert_marked(make())
        assert_marked(make().half())
        assert_marked(make().to(torch.bfloat16))
        assert_marked(make().to("meta"))
        assert_marked(make().to("meta").to_empty(device="cpu"))

    def test_inside_another_module(self) -> None:
        outer = nn.Sequential(make())
        outer.half()
        assert_marked(outer[0])
        assert_marked(copy.deepcopy(outer)[0])

    def test_copies_are_independent(self) -> None:
        experts = make()
        twin = copy.deepcopy(experts)
        assert_marked(twin)
        with torch.no_grad():
            twin.fc1_weight.zero_()
        assert experts.fc1_weight.any()

    def test_pickle(self) -> None:
        assert_marked(pickle.loads(pickle.dumps(make())))

    @pytest.mark.parametrize("assign", [False, True])
    def test_load_state_dict(self, assign: bool) -> None:
        source, target = nn.Sequential(make(seed=1)), nn.Sequential(make(seed=2))
        target.load_state_dict(source.state_dict(), assign=assign)
        assert_marked(target[0])
        assert torch.equal(source[0].fc2_weight, target[0].fc2_weight)


class TestParts:
    """Each expert's width is divided over ranks; what all parts give adds up to what the whole gives."""

    def made(self, activation: Any, part: tuple[int, int] = (0, 1)) -> Experts:
        return Experts(
            num_local_experts=3,
            first_expert_id=0,
            model_dim=4,
            hidden_dim=12,
            activation=activation,
            seed=5,
            gated_bias=isinstance(activation, ClampedSwiglu),
            part=part,
        ).double()

    @pytest.mark.parametrize("count", [2, 3])
    @pytest.mark.parametrize(
        "activation",
        [F.gelu, swiglu, ClampedSwiglu(alpha=1.702, limit=0.3)],
        ids=["gelu", "swiglu", "clamped"],
    )
    def test_outputs_and_gradients_add_up(self, activation: Any, count: int) -> None:
        rows_RD = torch.randn(7, 4, dtype=torch.float64)
        work = ExpertWork(counts_L=[3, 0, 4])
        whole = self.made(activation)
        y_RD = whole(rows_RD, work)
        y_RD.square().sum().backward()
        parts = [self.made(activation, (index, count)) for index in range(count)]
        partial = [part(rows_RD, work) for part in parts]
        torch.testing.assert_close(sum(partial), y_RD)
        sum(partial).square().sum().backward()
        for name, expected in whole.named_parameters():
            grads = [getattr(part, name).grad for part in parts]
            if name == "fc2_bias":  # whole everywhere, and added once
                assert all(grad is None for grad in grads[1:])
                torch.testing.assert_close(grads[0], expected.grad)
                continue
            placement = expert_placements(is_gated=is_gated(activation), is_cut=True)[name]
            cut = placement.cuts[1]
            for index, grad in enumerate(grads):
                slices = part_slices(expected.shape[cut.dim], index=index, count=count, blocks=cut.blocks)
                for tensor, values in (
                    (expected.grad, grad),
                    (expected.data, getattr(parts[index], name).data),
                ):
                    own = torch.cat(
                        [tensor.narrow(cut.dim, s.start, s.stop - s.start) for s in slices], cut.dim
                    )
                    torch.testing.assert_close(values, own)
