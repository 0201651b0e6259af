"""The criterion logs the numbers of the whole micro-batch on every rank that has a part of its logits.

Run with ``pytest tests/distributed/test_sharded_criterion.py``.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers.ranks import run_ranks
from tests.helpers.sharded_logits import AXES, PAD, micro_batch, part_of_rank


class PartModel(nn.Module):
    """Gives a part of fixed logits, and gate losses of the whole micro-batch, as a model over ranks does."""

    def __init__(self, logits_BSV: Tensor, output: Any, aux: Any) -> None:
        super().__init__()
        self.logits_BSV = logits_BSV
        self.extra = {"moe_aux": [None, aux], "moe_loss_coefficients": {}}
        if output is not None:
            self.extra["sharded_output"] = output

    def forward(self) -> tuple[Tensor, dict[str, Any]]:
        return self.logits_BSV * 1, self.extra

    def get_normalized_probs(self, net_output: Any, log_probs: bool) -> Tensor:
        return F.log_softmax(net_output[0], dim=-1)

    def get_targets(self, sample: dict[str, Any], net_output: Any) -> Tensor:
        target_BS: Tensor = sample["target"]
        return target_BS


def _criterion(rank: int, axes: dict[str, int], only_padding: bool) -> list[dict[str, Any]]:
    """The criterion's loss, sample size and logs of this rank's part, then of the whole."""
    from types import SimpleNamespace

    from fairseq_moe.criterions import MoECrossEntropyCriterion
    from fairseq_moe.distributed.mesh import parallel_mesh
    from fairseq_moe.modules import LOSSES, MoEAux
    from tests.helpers.layer_stats import histogram_of

    task = SimpleNamespace(target_dictionary=SimpleNamespace(pad=lambda: PAD))
    criterion = MoECrossEntropyCriterion(task, False, 0.5, "sum", "neg_log")
    logits_BSV, target_BS = micro_batch(9, 13, torch.float32, ignore_index=PAD)
    if only_padding:
        target_BS.fill_(PAD)
    sample = {"net_input": {}, "target": target_BS, "ntokens": int((target_BS != PAD).sum())}
    part, output = part_of_rank(parallel_mesh(4, **axes), logits_BSV)
    share = 0.1 * (1 + rank)
    found = []
    for logits, its_output in ((part, output), (logits_BSV, None)):
        own = torch.tensor(share if its_output is not None else 1.0, requires_grad=True)
        balance = own if its_output is None else output.shards.total(own)
        losses = torch.zeros(len(LOSSES)).index_fill(0, torch.tensor(LOSSES.index("balance")), 1.0) * balance
        aux = MoEAux(
            losses=losses, histogram_34E=histogram_of([[3, 1], [2, 1]]), measures_4=torch.arange(4.0)
        )
        loss, sample_size, logs = criterion(PartModel(logits.requires_grad_(), its_output, aux), sample)
        loss.backward()
        numbers = {name: value for name, value in logs.items() if not name.startswith("_")}
        found.append(
            {**numbers, "of the criterion": loss.detach(), "size": sample_size, "of a share": own.grad}
        )
    return found


@pytest.mark.parametrize("only_padding", [False, True])
def test_every_rank_logs_what_one_process_logs(only_padding: bool) -> None:
    for of_part, of_whole in run_ranks(_criterion, 4, AXES[3], only_padding):
        assert of_part.keys() == of_whole.keys()
        assert of_part["ntokens"] == of_part["size"] == (0 if only_padding else of_whole["ntokens"])
        for name, value in of_whole.items():
            torch.testing.assert_close(torch.as_tensor(of_part[name]), torch.as_tensor(value), msg=name)


def _single_losses(rank: int, axes: dict[str, int]) -> str:
    from types import SimpleNamespace

    from fairseq_moe.criterions import MoECrossEntropyCriterion
    from fairseq_moe.distributed.mesh import parallel_mesh
    from fairseq_moe.errors import MoEError

    task = SimpleNamespace(target_dictionary=SimpleNamespace(pad=lambda: PAD))
    criterion = MoECrossEntropyCriterion(task, False, 0.5, "sum", "none")
    logits_BSV, target_BS = micro_batch(9, 13, torch.float32, ignore_index=PAD)
    part, output = part_of_rank(parallel_mesh(4, **axes), logits_BSV)
    sample = {"net_input": {}, "target": target_BS, "ntokens": 1}
    with pytest.raises(MoEError) as refused:
        criterion(PartModel(part, output, None), sample, reduce=False)
    return str(refused.value)


def test_losses_of_single_tokens_are_refused() -> None:
    for message in run_ranks(_single_losses, 2, AXES[0]):
        assert "reduce=False" in message and "--tensor-model-parallel-size" in message
