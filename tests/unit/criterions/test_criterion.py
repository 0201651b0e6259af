"""moe_cross_entropy: its formula, its logged numbers, and cross_entropy where there are no experts."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fairseq.criterions.cross_entropy import CrossEntropyCriterion
from fairseq.logging import metrics
from torch import Tensor, nn

from fairseq_moe.criterions import MoECrossEntropyCriterion
from fairseq_moe.expert_load.record import LOAD_KEY
from fairseq_moe.modules import LOSSES, MoEAux
from fairseq_moe.modules.routing.stats import LAYER_STATS, MEASURES
from tests.helpers.layer_stats import histogram_of, stats_of
from tests.helpers.operators import Operators

PAD, VOCABULARY = 1, 11
TASK = SimpleNamespace(target_dictionary=SimpleNamespace(pad=lambda: PAD))


class FixedModel(nn.Module):
    """Gives its logits and auxiliary outputs whatever it is asked."""

    def __init__(
        self, logits: Tensor, auxes: list[MoEAux | None] | None, *, per_layer_logging: bool = False
    ) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)
        self.auxes = auxes
        self.per_layer_logging = per_layer_logging

    def forward(self, **net_input: Any) -> tuple[Tensor, dict[str, Any]]:
        extra = {
            "moe_aux": self.auxes,
            "moe_loss_coefficients": {},
            "moe_per_layer_logging": self.per_layer_logging,
        }
        return self.logits, {} if self.auxes is None else extra

    def get_normalized_probs(self, net_output: Any, log_probs: bool) -> Tensor:
        assert log_probs
        return F.log_softmax(net_output[0], dim=-1, dtype=torch.float32)

    def get_targets(self, sample: dict[str, Any], net_output: Any) -> Tensor:
        return sample["target"]


def make_sample(seed: int = 0) -> dict[str, Any]:
    torch.manual_seed(seed)
    target = torch.randint(2, VOCABULARY, (3, 5))
    target[0, 3:] = PAD
    return {"net_input": {}, "target": target, "ntokens": int((target != PAD).sum())}


def make_aux(loss: float, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> MoEAux:
    generator = torch.Generator().manual_seed(seed)
    losses = torch.zeros(len(LOSSES), dtype=dtype)
    losses[LOSSES.index("balance")] = loss
    return MoEAux(
        losses=losses.requires_grad_(),
        histogram_34E=histogram_of([[3, 1], [2, 1]]),
        measures_4=torch.rand(len(MEASURES), generator=generator),
    )


def criterion(
    *, weight: float = 0.5, method: str = "sum", transform: str = "none", sentence_avg: bool = False
) -> MoECrossEntropyCriterion:
    return MoECrossEntropyCriterion(TASK, sentence_avg, weight, method, transform)


def logged(outputs: list[dict[str, Any]], kind: type = MoECrossEntropyCriterion) -> dict[str, float]:
    with metrics.aggregate(new_root=True) as found:
        kind.reduce_metrics(outputs)
    return {key: float(value) for key, value in found.get_smoothed_values().items() if key[0] != "_"}


class TestFormula:
    SAMPLE = make_sample()
    LOGITS = torch.randn(3, 5, VOCABULARY, generator=torch.Generator().manual_seed(1))

    def loss(self, losses: list[float | None], **options: Any) -> tuple[Tensor, int, dict[str, Any], Tensor]:
        auxes = [None if value is None else make_aux(value) for value in losses]
        loss, size, log = criterion(**options)(FixedModel(self.LOGITS, auxes), self.SAMPLE)
        inner, _, _ = CrossEntropyCriterion(TASK, False)(FixedModel(self.LOGITS, None), self.SAMPLE)
        return loss.detach(), size, log, inner.detach()

    @pytest.mark.parametrize(
        ("options", "gate"),
        [
            ({"method": "sum"}, 3.5),
            ({"method": "average"}, 1.75),
            ({"method": "sum", "transform": "neg_log"}, -math.log(3.5)),
            ({"method": "average", "transform": "neg_log"}, -math.log(1.75)),
        ],
    )
    def test_inner_plus_weight_times_tokens_times_gate(self, options: dict[str, str], gate: float) -> None:
        loss, size, log, inner = self.loss([None, 1.5, None, 2.0], **options)
        assert size == self.SAMPLE["ntokens"] == 13
        torch.testing.assert_close(loss, inner + 0.5 * 13 * gate)
        torch.testing.assert_close(log["moe_gate_loss"], torch.tensor(13 * gate))
        assert torch.equal(log["inner_loss"], inner)
        assert torch.equal(log["loss"], loss)

    def test_sentence_average(self) -> None:
        loss, size, log, inner = self.loss([1.5], sentence_avg=True)
        assert size == 3
        torch.testing.assert_close(loss, inner + 0.5 * 3 * 1.5)
        assert log["sample_size"] == 3 and log["ntokens"] == 13 and log["nsentences"] == 3

    def test_zero_weight(self) -> None:
        loss, _, log, inner = self.loss([1.5], weight=0.0)
        assert torch.equal(loss, inner)
        assert float(log["moe_gate_loss"]) == 13 * 1.5

    def test_gradient_reaches_every_layer(self) -> None:
        auxes = [make_aux(1.5), None, make_aux(2.0)]
        loss, size, _ = criterion(weight=0.01, method="average")(FixedModel(self.LOGITS, auxes), self.SAMPLE)
        loss.backward()
        for aux in (auxes[0], auxes[2]):
            assert aux is not None and aux.losses.grad is not None
            assert float(aux.losses.grad[0]) == pytest.approx(0.01 * size / 2)

    def test_unreduced_losses_sum_to_the_same(self) -> None:
        model = FixedModel(self.LOGITS, [make_aux(1.5)])
        reduced, _, _ = criterion()(model, self.SAMPLE)
        unreduced, _, _ = criterion()(model, self.SAMPLE, reduce=False)
        assert unreduced.shape == (15,)
        torch.testing.assert_close(unreduced.sum(), reduced)

    def test_negative_logarithm_of_a_batch_of_padding(self) -> None:
        aux = make_aux(0.0)
        loss, _, log = criterion(transform="neg_log")(FixedModel(self.LOGITS, [aux]), self.SAMPLE)
        (loss * 0).backward()
        assert aux.losses.grad is not None and float(aux.losses.grad[0]) == 0
        assert float(log["moe_gate_loss"]) == 0

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_gate_loss_is_summed_in_float32(self, dtype: torch.dtype) -> None:
        # 0.0625 is less than the spacing of half-precision numbers at 512
        auxes = [make_aux(512.0, dtype=dtype), *[make_aux(0.0625, dtype=dtype)] * 16]
        _, size, log = criterion()(FixedModel(self.LOGITS.to(dtype), auxes), self.SAMPLE)
        assert log["moe_gate_loss"].dtype == torch.float32
        assert float(log["moe_gate_loss"]) == size * 513.0

    def test_float64_stays_float64(self) -> None:
        model = FixedModel(self.LOGITS, [make_aux(1 + 1e-12, dtype=torch.float64)])
        _, size, log = criterion()(model, self.SAMPLE)
        assert log["moe_gate_loss"].dtype == torch.float64
        assert float(log["moe_gate_loss"]) == size * (1 + 1e-12)


@pytest.mark.parametrize("sentence_avg", [False, True])
@pytest.mark.parametrize("auxes", [None, [], [None, None]], ids=["dense", "empty", "pseudo-moe"])
class TestWithoutExperts:
    def test_equals_cross_entropy_to_the_bit(self, auxes: Any, sentence_avg: bool) -> None:
        sample, logits = make_sample(), torch.randn(3, 5, VOCABULARY)
        results = []
        for chosen in (CrossEntropyCriterion(TASK, sentence_avg), criterion(sentence_avg=sentence_avg)):
            model = FixedModel(logits.clone(), auxes)
            loss, size, log = chosen(model, sample)
            loss.backward()
            results.append((loss.detach(), size, model.logits.grad, logged([log], type(chosen))))
        stock, ours = results
        assert torch.equal(stock[0], ours[0])
        assert stock[1] == ours[1]
        assert torch.equal(stock[2], ours[2])
        assert {key: ours[3][key] for key in stock[3]} == stock[3]

    def test_gate_loss_and_statistics_are_zero(self, auxes: Any, sentence_avg: bool) -> None:
        _, _, log = criterion(sentence_avg=sentence_avg)(
            FixedModel(torch.randn(3, 5, VOCABULARY), auxes), make_sample()
        )
        numbers = logged([log])
        assert numbers["moe_gate_loss"] == 0
        assert {numbers[name] for name in LAYER_STATS} == {0.0}
        assert numbers["loss"] == numbers["inner_loss"]


class TestLoggedNumbers:
    def outputs(self, sentence_avg: bool = False) -> list[dict[str, Any]]:
        """Two micro-batches of different size, two MoE layers each."""
        logs = []
        for index in range(2):
            sample = make_sample(seed=index)
            if index == 1:
                sample["target"][1:] = PAD
                sample["ntokens"] = int((sample["target"] != PAD).sum())
            torch.manual_seed(index)
            auxes = [make_aux(1.5 + index, seed=index), None, make_aux(2.0, seed=5 + index)]
            model = FixedModel(torch.randn(3, 5, VOCABULARY), auxes)
            logs.append(criterion(sentence_avg=sentence_avg)(model, sample)[2])
        return logs

    def test_by_formula(self) -> None:
        first, second = logs = self.outputs()
        numbers = logged(logs)
        tokens = first["ntokens"] + second["ntokens"]
        assert (first["ntokens"], second["ntokens"]) == (13, 3)
        inner = float(first["inner_loss"] + second["inner_loss"])
        assert numbers["inner_loss"] == pytest.approx(inner / tokens / math.log(2), abs=5e-4)
        gate = (13 * 3.5 + 3 * 4.5) / 16
        assert numbers["moe_gate_loss"] == pytest.approx(gate, abs=1e-6)
        total = inner + 0.5 * (13 * 3.5 + 3 * 4.5)
        assert numbers["loss"] == pytest.approx(total / tokens / math.log(2), abs=5e-4)
        assert numbers["ppl"] == pytest.approx(2 ** (inner / tokens / math.log(2)), rel=1e-3)
        assert "nll_loss" not in numbers

    def test_statistics_are_means_over_layers_and_micro_batches(self) -> None:
        numbers = logged(self.outputs())
        layers = [stats_of(make_aux(0.0, seed=seed)) for seed in (0, 5, 1, 6)]
        for name, value in zip(LAYER_STATS, torch.stack(layers).mean(0).tolist(), strict=True):
            assert numbers[name] == pytest.approx(value, abs=1e-3), name

    def test_sentence_average_adds_nll_loss(self) -> None:
        first, second = logs = self.outputs(sentence_avg=True)
        numbers = logged(logs)
        inner = float(first["inner_loss"] + second["inner_loss"])
        assert numbers["inner_loss"] == pytest.approx(inner / 6 / math.log(2), abs=5e-4)
        assert numbers["nll_loss"] == pytest.approx(inner / 16 / math.log(2), abs=5e-4)
        assert numbers["ppl"] == pytest.approx(2 ** (inner / 16 / math.log(2)), rel=1e-3)

    def test_sums_over_ranks_log_the_same(self) -> None:
        logs = self.outputs()
        assert MoECrossEntropyCriterion.logging_outputs_can_be_summed()
        assert logs[0].keys() == logs[1].keys()
        summed = {key: logs[0][key] + logs[1][key] for key in logs[0]}
        assert logged([summed]) == pytest.approx(logged(logs), abs=1e-5)

    def test_a_dummy_batch_counts_for_nothing(self) -> None:
        logs = self.outputs()
        dummy = {key: value * 0 for key, value in logs[1].items()}
        assert logged([logs[0], dummy]) == logged([logs[0]])

    def test_load_is_summed(self) -> None:
        with metrics.aggregate(new_root=True) as found:
            MoECrossEntropyCriterion.reduce_metrics(self.outputs())
        load = found[LOAD_KEY].sum
        assert load.tolist() == [[[6, 2], [4, 2]]] * 2

    def test_layers_are_logged_by_themselves_where_asked(self) -> None:
        auxes = [make_aux(1.5, seed=3), None, make_aux(2.0, seed=4)]
        model = FixedModel(torch.randn(3, 5, VOCABULARY), auxes, per_layer_logging=True)
        log = criterion()(model, make_sample())[2]
        for index in (0, 2):
            aux = auxes[index]
            assert aux is not None
            assert torch.equal(log[f"_moe_layer{index}_stats"], stats_of(aux))
            assert log[f"_moe_layer{index}_load"].tolist() == [[3, 1], [2, 1]]
            assert torch.equal(log[f"_moe_layer{index}_losses"], 13 * aux.losses.detach())
        assert not any(key.startswith("_moe_layer1") for key in log)

    def test_statistics_of_all_layers_sort_once(self) -> None:
        sorts = []
        for number in (1, 4):
            model = FixedModel(
                torch.randn(3, 5, VOCABULARY), [make_aux(1.5, seed=seed) for seed in range(number)]
            )
            with Operators() as operators:
                criterion()(model, make_sample())
            sorts.append(operators.names["sort"])
        assert sorts == [1, 1]

    def test_rounding_is_that_of_the_branch(self) -> None:
        with metrics.aggregate(new_root=True) as found:
            MoECrossEntropyCriterion.reduce_metrics(self.outputs())
        rounds = {name: meter.round for name, meter in found.items() if hasattr(meter, "round")}
        assert rounds["moe_gate_loss"] == 8
        assert {rounds[name] for name in ("loss", "inner_loss", *LAYER_STATS)} == {3}
