"""--fp16-adam-stats without apex: near plain Adam on gradients of any size, with half-precision state."""

import io
import math
from argparse import Namespace

import pytest
import torch
from fairseq.optim.adam import Adam, FairseqAdam
from fairseq.optim.fp16_optimizer import FP16Optimizer, MemoryEfficientFP16Optimizer
from omegaconf import OmegaConf
from torch import Tensor, nn

from fairseq_moe.fused.half_adam import round_at_random
from fairseq_moe.optim import HalfAdam, half_adam

MAGNITUDES = [1e-15, 1e-12, 1e-6, 1e-3, 1.0, 1e3, 1e6, 1e12]


def twins(values: Tensor) -> tuple[nn.Parameter, nn.Parameter]:
    return nn.Parameter(values.clone()), nn.Parameter(values.clone())


def run_both(
    values: Tensor, grads: list[Tensor], **options: object
) -> tuple[nn.Parameter, nn.Parameter, HalfAdam]:
    ours, theirs = twins(values)
    half, plain = HalfAdam([ours], **options), Adam([theirs], **options)  # type: ignore[arg-type]
    for grad in grads:
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        half.step()
        plain.step()
    return ours, theirs, half


def noise(shape: tuple[int, ...], num_steps: int, magnitude: float = 1.0) -> list[Tensor]:
    torch.manual_seed(0)
    bias = torch.randn(shape)
    return [(magnitude * (bias + torch.randn(shape))) for _ in range(num_steps)]


class TestAgainstPlainAdam:
    def test_first_step_is_the_same_to_the_bit(self) -> None:
        ours, theirs, _ = run_both(torch.randn(50), noise((50,), 1), lr=0.1, weight_decay=0.01)
        assert torch.equal(ours, theirs)

    @pytest.mark.parametrize("magnitude", MAGNITUDES)
    def test_any_magnitude(self, magnitude: float) -> None:
        start = torch.randn(8, 25)
        ours, theirs, half = run_both(
            start, noise((8, 25), 200, magnitude), lr=1e-2, betas=(0.9, 0.98), eps=magnitude * 1e-8
        )
        moved = (theirs - start).norm()
        assert (ours - theirs).norm() < 2e-3 * moved
        state = half.state[ours]
        assert state["exp_avg"].dtype == state["root"].dtype == torch.float16
        assert state["exp_avg"].isfinite().all() and state["root"].isfinite().all()
        assert (state["root"] > 0).all()

    def test_magnitudes_within_one_tensor(self) -> None:
        # one row per magnitude from 1e-5 to 1e2, as those of rare and frequent words
        scale = 10.0 ** torch.arange(-5.0, 3.0).view(-1, 1)
        start = torch.randn(8, 40)
        grads = [scale * grad for grad in noise((8, 40), 300)]
        ours, theirs, _ = run_both(start, grads, lr=1e-2, betas=(0.9, 0.98))
        moved = (theirs - start).norm(dim=1)
        assert ((ours - theirs).norm(dim=1) < 3e-3 * moved).all()

    def test_far_below_the_largest_the_step_is_smaller_never_larger(self) -> None:
        scale = torch.tensor([1.0, 1e-10, 1e-14, 0.0])
        start = torch.ones(4)
        grads = [scale * (1 + 0.1 * grad) for grad in noise((4,), 50)]
        ours, theirs, _ = run_both(start, grads, lr=1e-2, eps=1e-30)
        step_ours, step_theirs = (start - ours).abs(), (start - theirs).abs()
        assert (step_ours <= step_theirs * 1.01).all()
        assert ours[3] == 1

    @pytest.mark.parametrize("beta2", [0.98, 0.999, 0.9999])
    def test_second_moment_does_not_stall(self, beta2: float) -> None:
        # with rounding to nearest the root drifts up to 40 % away at 0.9999
        num_steps = 2000
        grads = noise((400,), num_steps)
        half = run_both(torch.zeros(400), grads, lr=1e-4, betas=(0.9, beta2))[2]
        exact = torch.zeros(400)
        for grad in grads:
            exact = beta2 * exact + (1 - beta2) * grad**2
        kept = half.state_dict()["state"][0]["exp_avg_sq"]
        ratio = kept / exact
        assert abs(float(ratio.mean()) - 1) < 3e-3
        assert float((ratio - 1).abs().max()) < 0.1

    def test_gradients_that_cease(self) -> None:
        grads = [*noise((20,), 20), *[torch.zeros(20)] * 300]
        ours, theirs, half = run_both(torch.zeros(20), grads, lr=1e-2, betas=(0.9, 0.98))
        torch.testing.assert_close(ours, theirs, rtol=5e-3, atol=2e-4)
        assert (half.state[ours]["root"] > 0).all()

    def test_zero_gradients_and_none(self) -> None:
        first, second = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
        half = HalfAdam([first, second], lr=0.1)
        first.grad = torch.zeros(3)
        half.step()
        assert first.tolist() == second.tolist() == [1, 1, 1]
        assert not half.state[first]["root"].any()
        assert not half.state[second]

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
    def test_other_parameter_dtypes(self, dtype: torch.dtype) -> None:
        start = torch.randn(30).to(dtype)
        grads = [grad.to(dtype) for grad in noise((30,), 50)]
        ours, theirs, _ = run_both(start, grads, lr=1e-2, betas=(0.9, 0.98))
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=2e-3)

    def test_scalars_empty_and_transposed_parameters(self) -> None:
        for start in (torch.tensor(2.0), torch.empty(0, 3), torch.randn(4, 6).t()):
            grads = [torch.randn_like(start) for _ in range(5)]
            ours, theirs, _ = run_both(start, grads, lr=1e-2)
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)

    def test_chunks_change_the_draws_only(self, monkeypatch: pytest.MonkeyPatch) -> None:
        grads = noise((16, 8), 30)
        whole, theirs, _ = run_both(torch.ones(16, 8), grads, lr=1e-2)
        monkeypatch.setattr(half_adam, "_CHUNK_NUMEL", 24)
        cut, _, _ = run_both(torch.ones(16, 8), grads, lr=1e-2)
        torch.testing.assert_close(cut, whole, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(cut, theirs, rtol=1e-3, atol=1e-4)

    def test_draws_nothing_from_the_global_generator_and_repeats(self) -> None:
        before = torch.get_rng_state()
        runs = [run_both(torch.ones(16), [torch.full((16,), 0.3)] * 20, lr=1e-2)[0] for _ in range(2)]
        assert torch.equal(before, torch.get_rng_state())
        assert torch.equal(runs[0], runs[1])

    def test_closure(self) -> None:
        parameter = nn.Parameter(torch.ones(2))
        half = HalfAdam([parameter], lr=0.1)

        def closure() -> Tensor:
            half.zero_grad()
            loss = parameter.square().sum()
            loss.backward()
            return loss

        assert half.step(closure).item() == 2.0
        torch.testing.assert_close(parameter.detach(), torch.full((2,), 0.9))


class TestState:
    def trained(
        self, num_steps: int = 30, *, smallest: float = 1e-12
    ) -> tuple[nn.Parameter, HalfAdam, list[Tensor]]:
        scale = 10.0 ** torch.linspace(math.log10(smallest), 3, 50)
        grads = [scale * grad for grad in noise((4, 50), num_steps + 10)]
        parameter = nn.Parameter(torch.ones(4, 50))
        half = HalfAdam([parameter], lr=1e-2)
        for grad in grads[:num_steps]:
            parameter.grad = grad
            half.step()
        return parameter, half, grads[num_steps:]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    def test_exact_round_trip(self, dtype: torch.dtype) -> None:
        parameter, half, later = self.trained()
        file = io.BytesIO()
        torch.save(half.state_dict(), file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
        assert state["state"][0].keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert state["state"][0]["exp_avg_sq"].dtype == torch.float32

        twin = nn.Parameter(parameter.detach().clone())
        loaded = HalfAdam([twin], lr=0.5)
        loaded.load_state_dict(state)
        assert loaded.param_groups[0]["lr"] == 1e-2
        again = loaded.state_dict()["state"][0]
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(again[key], state["state"][0][key]), key
        for grad in later:
            for optimizer, values in ((half, parameter), (loaded, twin)):
                values.grad = grad.clone()
                optimizer.step()
            assert torch.equal(parameter, twin)

    def test_half_parameters_do_not_narrow_the_state(self) -> None:
        _, half, _ = self.trained()
        state = half.state_dict()
        narrow = HalfAdam([nn.Parameter(torch.ones(4, 50, dtype=torch.float16))])
        narrow.load_state_dict(state)
        again = narrow.state_dict()["state"][0]
        assert torch.equal(again["exp_avg_sq"], state["state"][0]["exp_avg_sq"])

    def test_experts_spread_over_other_ranks_keep_their_numbers(self) -> None:
        # two ranks with one expert each, of very different gradients, become one rank with two
        states = []
        for magnitude in (1e-9, 1e3):
            parameter = nn.Parameter(torch.ones(1, 4, 6))
            half = HalfAdam([parameter])
            for grad in noise((1, 4, 6), 10, magnitude):
                parameter.grad = grad
                half.step()
            states.append(half.state_dict()["state"][0])
        joined = {key: torch.cat([state[key] for state in states]) for key in ("exp_avg", "exp_avg_sq")}
        one = HalfAdam([nn.Parameter(torch.ones(2, 4, 6))])
        groups = one.state_dict()["param_groups"]
        one.load_state_dict({"state": {0: {**joined, "step": 10}}, "param_groups": groups})
        again = one.state_dict()["state"][0]
        torch.testing.assert_close(
            again["exp_avg_sq"].sqrt(), joined["exp_avg_sq"].sqrt(), rtol=1e-3, atol=1e-6
        )

    def test_plain_adam_goes_on_from_it_and_it_from_plain_adam(self) -> None:
        parameter, half, later = self.trained(smallest=1e-3)
        ours, theirs = twins(parameter.detach())
        plain = Adam([theirs], lr=1e-2)
        plain.load_state_dict(half.state_dict())
        back = HalfAdam([ours], lr=1e-2)
        back.load_state_dict(plain.state_dict())
        for grad in later:
            for optimizer, values in ((back, ours), (plain, theirs)):
                values.grad = grad.clone()
                optimizer.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)

    def test_parameters_without_state(self) -> None:
        first, second = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
        half = HalfAdam([first, second])
        second.grad = torch.ones(3)
        half.step()
        state = half.state_dict()
        assert list(state["state"]) == [1]
        fresh = HalfAdam([nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))])
        fresh.load_state_dict(state)
        assert list(fresh.state_dict()["state"]) == [1]

    def test_four_bytes_per_parameter(self) -> None:
        parameter, half, _ = self.trained()
        tensors = [value for value in half.state[parameter].values() if isinstance(value, Tensor)]
        large = sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor.dim() > 0)
        assert large == 4 * parameter.numel()


class TestRounding:
    def test_is_right_on_average(self) -> None:
        values = torch.full((100_000,), 1 + 0.3 * 2.0**-10)
        rounded = round_at_random(values, torch.Generator().manual_seed(0)).double()
        assert set(rounded.tolist()) == {1.0, 1 + 2.0**-10}
        assert (float(rounded.mean()) - 1) * 2**10 == pytest.approx(0.3, abs=0.01)

    def test_keeps_what_half_can_hold(self) -> None:
        bits = torch.arange(0x0400, 0x7800, dtype=torch.int32).to(
            torch.int16
        )  # the normal numbers below 2**15
        values = bits.view(torch.float16)
        assert torch.equal(round_at_random(values.float(), torch.Generator()), values)
        assert round_at_random(torch.zeros(3), torch.Generator()).tolist() == [0, 0, 0]

    @pytest.mark.parametrize("largest", [0.0, 1e-38, 1e-20, 0.9999, 1.0, 1.9999, 65504.0, 1e30])
    def test_scale(self, largest: float) -> None:
        scale = float(half_adam._scale_for(torch.tensor(largest)))
        assert math.log2(scale).is_integer()
        assert largest / scale * (1 + 2.0**-10) < 2.0**15


class TestThroughFairseq:
    def config(self, **options: object) -> object:
        values = {"lr": [0.1], "adam_betas": "(0.9,0.98)", "adam_eps": 1e-8, "weight_decay": 0.0}
        switches = {"use_old_adam": False, "fp16_adam_stats": True, "tpu": False}
        return OmegaConf.create({**values, **switches, **options})

    def test_the_flag_selects_it(self) -> None:
        import fairseq_moe  # noqa: F401  (installs the adapter)

        chosen = FairseqAdam(self.config(), [nn.Parameter(torch.ones(2))])
        assert isinstance(chosen.optimizer, HalfAdam)
        assert chosen.optimizer.param_groups[0]["betas"] == (0.9, 0.98)
        assert chosen.supports_memory_efficient_fp16 and chosen.supports_flat_params

    def test_without_the_flag_stock_decides(self) -> None:
        chosen = FairseqAdam(self.config(fp16_adam_stats=False), [nn.Parameter(torch.ones(2))])
        assert isinstance(chosen.optimizer, Adam)

    def test_tpu_is_still_refused_by_stock(self) -> None:
        with pytest.raises(NotImplementedError, match="only supported on GPU"):
            FairseqAdam(self.config(tpu=True), [nn.Parameter(torch.ones(2))])

    def fp16_config(self, *, memory_efficient: bool) -> object:
        common = {
            "fp16": True,
            "bf16": False,
            "fp16_init_scale": 4,
            "fp16_scale_window": 1,
            "fp16_scale_tolerance": 0.0,
            "threshold_loss_scale": None,
            "min_loss_scale": 1e-4,
            "fp16_no_flatten_grads": True,  # as experts need; flattening asks for CUDA
            "memory_efficient_fp16": memory_efficient,
            "on_cpu_convert_precision": False,
        }
        return OmegaConf.create(
            {
                "common": common,
                "optimization": {"update_freq": [1]},
                "distributed_training": {
                    "distributed_world_size": 1,
                    "pipeline_model_parallel": False,
                    "ddp_backend": "legacy_ddp",
                },
                "optimizer": OmegaConf.merge(self.config(), {"_name": "adam"}),
            }
        )

    @pytest.mark.parametrize("memory_efficient", [False, True])
    def test_half_precision_wrappers(self, memory_efficient: bool) -> None:
        torch.manual_seed(0)
        kind = MemoryEfficientFP16Optimizer if memory_efficient else FP16Optimizer
        cfg = self.fp16_config(memory_efficient=memory_efficient)
        wrappers, models = [], []
        for _ in range(2):
            model = nn.Linear(4, 4, bias=False).half()
            wrappers.append(kind.build_optimizer(cfg, list(model.parameters())))
            models.append(model)
        models[1].load_state_dict(models[0].state_dict())
        x = torch.randn(8, 4).half()

        def update(index: int) -> None:
            wrappers[index].zero_grad()
            wrappers[index].backward(models[index](x).float().square().mean())
            wrappers[index].clip_grad_norm(0.0)
            wrappers[index].step()

        for _ in range(3):
            update(0)
        wrappers[1].load_state_dict(wrappers[0].state_dict())
        models[1].load_state_dict(models[0].state_dict())
        state = next(iter(wrappers[1].optimizer.state.values()))
        assert state["root"].dtype == torch.float16
        assert state["step"] == 3
        if not memory_efficient:  # the float32 masters belong to the trainer's own loading
            with torch.no_grad():
                for master, own in zip(wrappers[1].fp32_params, wrappers[0].fp32_params, strict=True):
                    master.copy_(own)
        for index in range(2):
            update(index)
        assert torch.equal(models[0].weight, models[1].weight)


def test_namespace_configurations_work_too() -> None:
    args = Namespace(
        lr=[0.1],
        adam_betas="(0.9,0.98)",
        adam_eps=1e-8,
        weight_decay=0.0,
        use_old_adam=True,
        fp16_adam_stats=True,
        tpu=False,
    )
    assert isinstance(FairseqAdam(args, [nn.Parameter(torch.ones(2))]).optimizer, HalfAdam)
