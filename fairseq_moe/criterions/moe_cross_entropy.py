"""Cross entropy plus the weighted gate (balance) loss of an MoE model, with its statistics.

loss = inner + weight * n * gate, where inner is the summed negative log-likelihood in nats, n the sample size
(tokens, or sentences with --sentence-avg) and gate the sum or mean of the layers' balance losses. fairseq
divides the sum over ranks and micro-batches by the sum of n, so gate counts per token whatever the placement.
A model that predicts further tokens (--mtp-loss-weight) adds weight * the mean over its blocks of the same sum.
Ranks that share a micro-batch all compute and log its whole loss, each with the gradient of its own part.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from fairseq import utils
from fairseq.criterions import register_criterion
from fairseq.criterions.cross_entropy import CrossEntropyCriterion, CrossEntropyCriterionConfig
from fairseq.logging import metrics
from torch import Tensor

from fairseq_moe.criterions.nll import summed_nll
from fairseq_moe.criterions.per_layer import log_per_layer, per_layer_sums
from fairseq_moe.criterions.vocabulary_nll import sharded_nll
from fairseq_moe.errors import MoEError
from fairseq_moe.expert_load.record import LOAD_KEY
from fairseq_moe.expert_load.watch import LoadWatch
from fairseq_moe.flags.gate_loss import GateLossConfig
from fairseq_moe.models.flags import fairseq_dataclass
from fairseq_moe.modules.routing.contract import LOSSES
from fairseq_moe.modules.routing.stats import LAYER_STATS, layer_loads, layer_stats

__all__ = ["LOGGED_METRICS", "MoECrossEntropyCriterion", "MoECrossEntropyCriterionConfig"]

_LOGGED_LOSSES = tuple(name for name in LOSSES if name != "balance")
# What validation of any model logs, besides nll_loss where losses are averaged over sentences.
LOGGED_METRICS = (
    "loss", "inner_loss", "ppl", "moe_gate_loss", *(f"moe_{name}_loss" for name in _LOGGED_LOSSES), *LAYER_STATS,
)  # fmt: skip


_GateLossFlags: Any = fairseq_dataclass("_GateLossFlags", GateLossConfig)


@dataclass
class MoECrossEntropyCriterionConfig(CrossEntropyCriterionConfig, _GateLossFlags):  # type: ignore[misc]
    """Flags of the criterion ``moe_cross_entropy``."""


@register_criterion("moe_cross_entropy", dataclass=MoECrossEntropyCriterionConfig)
class MoECrossEntropyCriterion(CrossEntropyCriterion):
    """Adds balance losses to cross entropy, as the module says; of a dense model it is ``cross_entropy`` to the bit."""

    def __init__(
        self,
        task: Any,
        sentence_avg: bool,
        moe_gate_loss_wt: float,
        moe_gate_loss_combine_method: str,
        moe_gate_loss_transform: str,
    ) -> None:
        super().__init__(task, sentence_avg)
        self.gate_loss_weight = moe_gate_loss_wt
        self.gate_loss_combine_method = str(moe_gate_loss_combine_method)
        self.gate_loss_transform = str(moe_gate_loss_transform)
        self.load_watch: LoadWatch | None = None  # the model's; the adapter shows it the load of all ranks

    def forward(
        self, model: Any, sample: dict[str, Any], reduce: bool = True
    ) -> tuple[Tensor, Any, dict[str, Any]]:
        """Compute the loss in nats, the sample size, and sums for logging."""
        net_output = model(**sample["net_input"])
        self.load_watch = net_output[1].get("moe_load_watch")
        inner_loss, _ = self.compute_loss(model, net_output, sample, reduce=reduce)
        sample_size = sample["target"].size(0) if self.sentence_avg else sample["ntokens"]
        logging_output = {
            "inner_loss": inner_loss.data,
            "ntokens": sample["ntokens"],
            "nsentences": sample["target"].size(0),
            "sample_size": sample_size,
            "batch_count": 1,
        }
        auxes = [aux for aux in net_output[1].get("moe_aux", []) if aux is not None]
        coefficients = net_output[1].get("moe_loss_coefficients", {})
        gate_loss = self._gate_loss(auxes, coefficients, inner_loss)
        loss = inner_loss
        if auxes:
            weighted = self.gate_loss_weight * gate_loss + _weighted_losses(auxes, coefficients)
            # Unreduced losses share the auxiliary ones out, so that their sum is the same.
            loss = inner_loss + sample_size / inner_loss.numel() * weighted
        if "mtp_logits" in net_output[1]:
            mtp_loss = self._mtp_loss(net_output[1], model.get_targets(sample, net_output), sample_size)
            loss = loss + mtp_loss / inner_loss.numel()
            logging_output["mtp_loss"] = mtp_loss.data
        logging_output["loss"] = loss.data
        logging_output["moe_gate_loss"] = (sample_size * gate_loss).data
        logging_output.update(_layer_mean_losses(auxes, sample_size, inner_loss))
        logging_output.update(_layer_numbers(net_output[1], sample_size, inner_loss))
        return loss, sample_size, logging_output

    def compute_loss(
        self, model: Any, net_output: Any, sample: dict[str, Any], reduce: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Compute the cross entropy, and return it twice, as stock does; with experts by less memory traffic.

        Raises:
            MoEError: losses of single tokens are asked for, and ranks have other tokens of the batch each.
        """
        logits, extra = net_output[0], net_output[1]
        if "sharded_output" in extra:
            return self._sharded_loss(logits, model.get_targets(sample, net_output), extra, reduce=reduce)
        has_experts = any(aux is not None for aux in extra.get("moe_aux", []))
        if not (reduce and has_experts):
            loss: tuple[Tensor, Tensor] = super().compute_loss(model, net_output, sample, reduce=reduce)
            return loss
        target_T = model.get_targets(sample, net_output).view(-1)
        nll = summed_nll(logits.reshape(-1, logits.shape[-1]), target_T, ignore_index=self.padding_idx)
        return nll, nll

    def _sharded_loss(
        self, logits_BSV: Tensor, target_BS: Tensor, extra: dict[str, Any], *, reduce: bool
    ) -> tuple[Tensor, Tensor]:
        """Compute the loss of all positions, of which each rank has its own: also of a batch of padding alone."""
        if not reduce:
            raise MoEError(
                "moe_cross_entropy: the losses of single tokens (reduce=False) were asked for, but each rank has other "
                "tokens and words of the batch (--context-parallel-size or --tensor-model-parallel-size above 1); "
                "run evaluation commands, which load the model without these axes."
            )
        output = extra["sharded_output"]
        nll = sharded_nll(logits_BSV, target_BS, output, ignore_index=self.padding_idx)
        return nll, nll

    def _mtp_loss(self, extra: dict[str, Any], target_BS: Tensor, sample_size: Any) -> Tensor:
        """Sum the losses of further tokens over the batch, with those of their experts, times their weight."""
        logits = extra["mtp_logits"]
        total = torch.zeros((), device=target_BS.device)
        for index, (logits_BSV, aux) in enumerate(zip(logits, extra["mtp_aux"], strict=True)):
            target_T = target_BS[:, index + 1 :].reshape(-1)
            flat_TV = logits_BSV.reshape(-1, logits_BSV.shape[-1])
            total = total + summed_nll(flat_TV, target_T, ignore_index=self.padding_idx)
            if aux is not None:
                coefficients = extra["moe_loss_coefficients"]
                gate_loss = self._gate_loss([aux], coefficients, total)
                weighted = self.gate_loss_weight * gate_loss + _weighted_losses([aux], coefficients)
                total = total + sample_size * weighted
        return total * (extra["mtp_loss_weight"] / len(logits))

    def _gate_loss(self, auxes: list[Any], coefficients: dict[str, float], inner_loss: Tensor) -> Tensor:
        # Only the moe branch's rules have the balance loss; the others have losses with coefficients of their own.
        if coefficients or not auxes:
            return torch.zeros((), device=inner_loss.device)
        layer_losses = [aux.balance_loss for aux in auxes]
        # float() keeps the sum in fp32 whatever the model computes in; a float64 model stays float64.
        terms = [loss if loss.dtype == torch.float64 else loss.float() for loss in layer_losses]
        gate_loss = torch.stack(terms).sum()
        if self.gate_loss_combine_method == "average":
            gate_loss = gate_loss / len(terms)
        if self.gate_loss_transform == "neg_log":
            # A batch of padding only has gate loss 0; its logarithm would give NaN gradients, even times 0.
            gate_loss = -torch.log(torch.where(gate_loss > 0, gate_loss, 1.0))
        return gate_loss

    @staticmethod
    def reduce_metrics(logging_outputs: list[dict[str, Any]]) -> None:
        """Log losses in bits (base 2), statistics in their own units (see ``stats.LAYER_STATS``)."""

        def total(key: str) -> Any:
            return sum(log.get(key, 0) for log in logging_outputs)

        sample_size, ntokens, batches = total("sample_size"), total("ntokens"), total("batch_count")
        # Batches of padding alone count for nothing: 0, not NaN, with weight 0.
        per_sample, per_token, per_batch = sample_size or 1, ntokens or 1, batches or 1
        metrics.log_scalar("loss", total("loss") / per_sample / math.log(2), sample_size, round=3)
        metrics.log_scalar("moe_gate_loss", total("moe_gate_loss") / per_sample, sample_size, round=8)
        for name in _LOGGED_LOSSES:
            metrics.log_scalar(
                f"moe_{name}_loss", total(f"moe_{name}_loss") / per_sample, sample_size, round=8
            )
        if any("mtp_loss" in log for log in logging_outputs):
            metrics.log_scalar("mtp_loss", total("mtp_loss") / per_sample / math.log(2), sample_size, round=3)
        for name in LAYER_STATS:
            metrics.log_scalar(name, total(name) / per_batch, batches, round=3)
        loads = [log[LOAD_KEY] for log in logging_outputs if LOAD_KEY in log]
        if loads:
            metrics.log_scalar_sum(LOAD_KEY, sum(loads))
        log_per_layer(logging_outputs, sample_size=sample_size, batches=batches)
        metrics.log_scalar("inner_loss", total("inner_loss") / per_sample / math.log(2), sample_size, round=3)
        perplexity_of = "inner_loss"
        if sample_size != ntokens:
            perplexity_of = "nll_loss"
            metrics.log_scalar("nll_loss", total("inner_loss") / per_token / math.log(2), ntokens, round=3)
        metrics.log_derived("ppl", lambda meters: utils.get_perplexity(meters[perplexity_of].avg))

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        """Promise that all outputs are sums, with the same keys on every rank."""
        return True


def _weighted_losses(auxes: list[Any], coefficients: dict[str, float]) -> Tensor:
    """Sum coefficient * loss over layers and the losses that the model's flags weigh."""
    total = torch.stack([aux.losses for aux in auxes]).sum(0)
    # One by one, because a tensor of the coefficients would have to be copied to the device.
    terms = [coefficients.get(name, 0.0) * loss for name, loss in zip(LOSSES, total.unbind(), strict=True)]
    return torch.stack(terms).sum()


def _layer_mean_losses(auxes: list[Any], sample_size: Any, inner_loss: Tensor) -> dict[str, Tensor]:
    """Average each loss over the MoE layers, without coefficients, times the sample size."""
    means = torch.zeros(len(LOSSES), device=inner_loss.device)
    if auxes:
        means = torch.stack([aux.losses.detach() for aux in auxes]).mean(0)
    by_name = dict(zip(LOSSES, (sample_size * means).unbind(), strict=True))
    return {f"moe_{name}_loss": by_name[name] for name in _LOGGED_LOSSES}


def _layer_numbers(extra: dict[str, Any], sample_size: Any, inner_loss: Tensor) -> dict[str, Tensor]:
    """Average the statistics over the MoE layers, add the layers' loads as one (L, 2, E) tensor, and list each layer's.

    Statistics are taken for all layers together, once per forward pass.
    """
    auxes = [aux for aux in extra.get("moe_aux", []) if aux is not None]
    if not auxes:
        zero = torch.zeros((), device=inner_loss.device)
        return {name: zero for name in LAYER_STATS}
    histogram_L34E = torch.stack([aux.histogram_34E for aux in auxes])
    stats_L = layer_stats(histogram_L34E, torch.stack([aux.measures_4 for aux in auxes]))
    loads_L2E = layer_loads(histogram_L34E)
    outputs = dict(zip(LAYER_STATS, stats_L.mean(0).unbind(), strict=True))
    outputs[LOAD_KEY] = loads_L2E
    if extra.get("moe_per_layer_logging"):
        outputs.update(per_layer_sums(extra["moe_aux"], stats_L, loads_L2E, sample_size))
    return outputs
