"""Run an update's micro-batches through a pipeline, inside one call of the task's ``train_step``.

Stock's trainer hands micro-batches to the task one by one, and a stage would idle while the others compute. So the
trainer gets one *composite* sample that holds them all; the task runs the schedule over them and gives their summed
loss, size and logs, the same on every stage. Reduction, clipping, scaling, the optimizer and logging stay stock's.

The last stage computes the loss of one model: what experts of earlier stages say travels with the hidden values.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fairseq_moe.distributed import broadcast_value
from fairseq_moe.distributed.pipeline import run_steps
from fairseq_moe.faults import fault
from fairseq_moe.models.decoder import MoEDecoder
from fairseq_moe.models.stage_values import SideTensor, StageInput
from fairseq_moe.parallel.schedule import Action, Recv, lowered, lowered_forward, with_dummies
from fairseq_moe.stock.step.dummy import as_dummy, is_dummy, without_dummy

__all__ = ["MICRO_BATCHES", "composite", "evaluate_in_stages", "train_in_stages"]

MICRO_BATCHES = "micro_batches"  # the key of a composite sample

Result = tuple[Any, Any, dict[str, Any]]  # loss, sample size, logs


def composite(samples: Sequence[Any]) -> list[dict[str, Any]]:
    """Make one sample of an update's micro-batches."""
    return [{MICRO_BATCHES: list(samples)}]


def train_in_stages(
    samples: list[Any],
    model: Any,
    decoder: MoEDecoder,
    criterion: Any,
    optimizer: Any,
    see_hidden: Callable[[Tensor, int], None],
) -> Result:
    """Compute forward and backward passes of all micro-batches; returns their sums, on every stage.

    Args:
        samples: prepared micro-batches.
        model: the whole model, in whatever wrapper.
        decoder: of it.
        criterion: on the last stage.
        optimizer: scales the loss in half precision.
        see_hidden: is shown what goes to the next stage, and after how many layers.
    """
    layout, mesh = decoder.stage.layout, decoder.stage.mesh
    assert mesh is not None
    missing = with_dummies(layout.pipe, layout.virtual, len(samples)) - len(samples)
    samples = samples + [as_dummy(samples[0])] * missing
    work = _Update(samples, model, decoder, criterion, optimizer, see_hidden)
    run_steps(lowered(layout.pipe, layout.virtual, len(samples))[mesh.pipe_index], work, mesh)
    return work.total()


def evaluate_in_stages(sample: Any, model: Any, decoder: MoEDecoder, criterion: Any) -> Result:
    """Compute the forward pass of one batch; returns its loss, size and logs on every stage."""
    layout, mesh = decoder.stage.layout, decoder.stage.mesh
    assert mesh is not None
    work = _Update([sample], model, decoder, criterion, None, lambda x, num_layers: None)
    run_steps(lowered_forward(layout.pipe, layout.virtual, 1)[mesh.pipe_index], work, mesh)
    return work.total()


class _Finished:
    """Stand for the model where its output is there already: a criterion calls it, and asks it for targets."""

    def __init__(self, model: Any, output: Any) -> None:
        self._model, self._output = model, output

    def __call__(self, **net_input: Any) -> Any:
        return self._output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


class _Update:
    """Compute the passes of this rank's chunks, and keep what their backward passes need."""

    def __init__(
        self,
        samples: list[Any],
        model: Any,
        decoder: MoEDecoder,
        criterion: Any,
        optimizer: Any,
        see_hidden: Callable[[Tensor, int], None],
    ) -> None:
        self._samples, self._model, self._decoder = samples, model, decoder
        self._criterion, self._optimizer, self._see_hidden = criterion, optimizer, see_hidden
        if hasattr(criterion, "load_watch"):  # rank 0 looks at the load, and computes no loss
            criterion.load_watch = decoder.load_watch
        self._inputs: dict[tuple[int, int], list[Tensor]] = {}
        self._outputs: dict[tuple[int, int], Any] = {}
        self._results: list[Result] = []
        self._num_backward_left = [len(samples)] * decoder.stage.layout.virtual
        parameter = next(p for p in decoder.parameters())
        self._dtype, self._device = parameter.dtype, parameter.device

    def buffers(self, step: Recv) -> list[Tensor]:
        """Make the tensors that a message fills: hidden values and what experts say, or the gradients of both."""
        ids_BS = self._samples[step.micro_batch]["net_input"]["src_tokens"]
        part = self._decoder.shards.part_of(ids_BS.shape[1])
        x_BSD = torch.empty(
            (len(ids_BS), part.num_own, self._decoder.embed_dim), dtype=self._dtype, device=self._device
        )
        side = x_BSD.new_empty(self._decoder.side.shape(), dtype=SideTensor.dtype(self._dtype))
        return [x_BSD, side]

    def compute(self, action: Action, received: list[Tensor] | None) -> Sequence[Tensor]:
        """Compute a forward or backward pass of one micro-batch through one of this rank's chunks."""
        place = action.micro_batch, action.chunk
        return self._forward(place, received) if action.kind == "F" else self._backward(place, received)

    def _forward(self, place: tuple[int, int], received: list[Tensor] | None) -> Sequence[Tensor]:
        micro_batch, chunk = place
        if chunk == 0:  # once for each micro-batch, on every stage
            fault("train.forward" if self._optimizer is not None else "valid.forward")
        sample, at = self._samples[micro_batch], StageInput(virtual=chunk)
        if received is not None:
            if self._optimizer is not None:
                received = [tensor.requires_grad_() for tensor in received]
            at = StageInput(virtual=chunk, x_BSD=received[0], side=received[1])
            self._inputs[place] = received
        output = self._model(**sample["net_input"], stage_input=at)
        num_layers = self._decoder.stage.chunks[chunk].stop
        if num_layers < self._decoder.num_layers:
            self._see_hidden(output[0], num_layers)
            self._outputs[place] = list(output)
            return [tensor.detach() for tensor in output]
        loss, sample_size, logged = self._criterion(_Finished(self._model, output), sample)
        if is_dummy(sample):
            loss, sample_size, logged = without_dummy(loss * 0, sample_size, logged)
        self._outputs[place] = loss
        self._results.append((loss.detach(), sample_size, logged))
        return []

    def _backward(self, place: tuple[int, int], received: list[Tensor] | None) -> Sequence[Tensor]:
        output, inputs = self._outputs.pop(place), self._inputs.pop(place, [])
        self._num_backward_left[place[1]] -= 1
        self._choose_sync(place[1])
        if received is None:
            self._optimizer.backward(output)
        else:
            pairs = [
                (value, grad) for value, grad in zip(output, received, strict=True) if value.requires_grad
            ]
            torch.autograd.backward([value for value, _ in pairs], [grad for _, grad in pairs])
            if hasattr(self._optimizer, "_needs_sync"):
                self._optimizer._needs_sync = True  # as FP16Optimizer.backward notes, which scales a loss
        return [torch.zeros_like(value) if value.grad is None else value.grad for value in inputs]

    def _choose_sync(self, chunk: int) -> None:
        """Let sharded states reduce gradients of layers in their last pass, and all others in the last of all."""
        choose = getattr(self._model, "reduce_in_next_backward", None)
        if choose is not None:
            decoder, indices = self._decoder, self._decoder.stage.chunks[chunk]
            layers = [decoder.layers[index] for index in indices]
            if indices.stop == decoder.num_layers:
                layers += getattr(decoder, "mtp", ())
            choose(
                layers,
                of_layers=self._num_backward_left[chunk] == 0,
                of_others=sum(self._num_backward_left) == 0,
            )

    def total(self) -> Result:
        """Add up the results of all micro-batches, which the last stage has, and tell them to all stages."""
        mesh, stage = self._decoder.stage.mesh, self._decoder.stage
        assert mesh is not None
        found = None
        if stage.is_last:
            loss = torch.stack([loss for loss, _, _ in self._results]).sum()
            size = sum(size for _, size, _ in self._results)
            logs: dict[str, Any] = {}
            for _, _, logged in self._results:
                for key, value in logged.items():
                    logs[key] = logs[key] + value if key in logs else value
            found = loss, size, logs
        result: Result = broadcast_value(
            found, src=mesh.rank_of_stage(stage.layout.pipe - 1), group=mesh.pipe, device=self._device
        )
        return result
