"""The training loop around an MoE model: dummy batches, start-up messages, memory and load statistics."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from fairseq.logging import metrics
from fairseq.tasks.fairseq_task import FairseqTask
from torch import nn

from fairseq_moe.distributed import broadcast_value, rank, set_collective_timeout, world_size
from fairseq_moe.expert_load.record import LOAD_KEY
from fairseq_moe.faults import fault
from fairseq_moe.flags.reliability import ReliabilityConfig
from fairseq_moe.flags.sharding import sharding_of
from fairseq_moe.parallel.placement import shard
from fairseq_moe.stock.checkpoint.named_state import choose_state
from fairseq_moe.stock.checkpoint.saving import finish_background_save, note_background_save
from fairseq_moe.stock.find_experts import any_flattened, moe_decoder
from fairseq_moe.stock.run import MoERun, begin_run, note_mesh, run_of
from fairseq_moe.stock.seam import seam
from fairseq_moe.stock.start.ending import FIRST_UPDATE_TIMEOUTS, current_watchdog
from fairseq_moe.stock.step.dummy import as_dummy, dummy_batch, is_dummy, without_dummy
from fairseq_moe.stock.step.expert_load import record_expert_load_after_validation, write_expert_load
from fairseq_moe.stock.step.guard import StepGuard
from fairseq_moe.stock.step.lock import SaveDirectoryError, lock_save_directory
from fairseq_moe.stock.step.pipelining import (
    MICRO_BATCHES,
    composite,
    evaluate_in_stages,
    train_in_stages,
)
from fairseq_moe.stock.step.profiling import profiled, profiler_of_run
from fairseq_moe.stock.step.start_log import log_sizes, warn_once


@seam(
    "fairseq.trainer:Trainer.__init__",
    signature="(self, cfg, task, model, criterion, quantizer)",
    stock_does="counts the parameters of FSDP shards, and loads checkpoints on rank 0 only",
    breaks="the logged sizes are those of a shard; other ranks need other experts",
    we_do="log true sizes in the branch's words, load on all ranks, warn of a criterion without gate loss, "
    "and write the load of the experts after each validation",
    test="tests/e2e/test_training.py",
)
def trainer_init(
    stock: Callable[..., Any],
    self: Any,
    cfg: Any,
    task: Any,
    model: nn.Module,
    criterion: nn.Module,
    quantizer: Any = None,
) -> None:
    decoder = moe_decoder(model)
    if decoder is not None:
        cfg.checkpoint.load_checkpoint_on_all_dp_ranks = True
        note_mesh(self, decoder.mesh)
        log_sizes(model, decoder)
        if rank() == 0:
            warn_once(cfg, decoder, criterion)
    stock(self, cfg, task, model, criterion, quantizer)
    for p in model.parameters():
        if any_flattened([p]):
            shard(p)
    if decoder is not None:
        _lock_save_directory(self)
        record_expert_load_after_validation(self, task, decoder)
        assert decoder.mesh is not None
        guard = StepGuard(ReliabilityConfig.from_args(cfg.model), decoder.mesh.ranks)
        run = MoERun(
            decoder=decoder,
            guard=guard,
            state=choose_state(self),
            at_end=finish_background_save,
            profiler=profiler_of_run(cfg, on_gpu=self.cuda),
            sharding=sharding_of(cfg),
        )
        begin_run(run, self, task)
        guard.signals.listen()
        _set_timeouts(self, run, FIRST_UPDATE_TIMEOUTS)


def _lock_save_directory(trainer: Any) -> None:
    """Lock the save directory on rank 0; all ranks learn of a refusal. fairseq-train has made it by now."""
    cfg, refusal = trainer.cfg.checkpoint, None
    if rank() == 0 and not cfg.no_save and os.path.isdir(cfg.save_dir):
        try:
            lock_save_directory(cfg.save_dir)
        except SaveDirectoryError as error:
            refusal = error
    refusal = broadcast_value(refusal)
    if refusal is not None:
        raise refusal


@seam(
    "fairseq.trainer:Trainer._prepare_sample",
    signature="(self, sample, is_dummy)",
    stock_does="gives a rank without data the first batch again",
    breaks="its tokens take places at experts of other ranks and enter the statistics",
    we_do="mark the batch, so that the router leaves all of its tokens out",
    test="tests/distributed/test_uneven_batches.py",
)
def prepare_sample(
    stock: Callable[..., Any], self: Any, sample: Any, is_dummy: bool = False
) -> tuple[Any, bool]:
    if sample and MICRO_BATCHES in sample:
        members = [_prepare_one(stock, self, member)[0] for member in sample[MICRO_BATCHES]]
        return {MICRO_BATCHES: members}, False
    return _prepare_one(stock, self, sample, is_dummy)


def _prepare_one(
    stock: Callable[..., Any], self: Any, sample: Any, is_dummy: bool = False
) -> tuple[Any, bool]:
    """Prepare one micro-batch as stock does, and mark a dummy."""
    prepared, is_dummy_batch = stock(self, sample, is_dummy)
    if not is_dummy_batch or run_of(self) is None:
        return prepared, is_dummy_batch
    return as_dummy(prepared), not _task_uses_stock_steps(self.task)


def _task_uses_stock_steps(task: Any) -> bool:
    kind = type(task)
    return kind.train_step is FairseqTask.train_step and kind.valid_step is FairseqTask.valid_step


@seam(
    "fairseq.tasks.fairseq_task:FairseqTask.train_step",
    signature="(self, sample, model, criterion, optimizer, update_num, ignore_grad)",
    stock_does="leaves it to the trainer to ignore a dummy batch, which then ignores all of the update's "
    "micro-batches on that rank if the last one is a dummy",
    breaks="with --update-freq, real micro-batches vanish from the sample size and the statistics",
    we_do="zero the sample size and the statistics of the dummy micro-batch alone",
    test="tests/distributed/test_uneven_batches.py",
)
def train_step(
    stock: Callable[..., Any],
    self: Any,
    sample: Any,
    model: Any,
    criterion: Any,
    optimizer: Any,
    update_num: int,
    ignore_grad: bool = False,
) -> tuple[Any, Any, dict[str, Any]]:
    run = run_of(self)
    if run is not None and MICRO_BATCHES in sample:
        return _train_in_stages(run, sample[MICRO_BATCHES], model, criterion, optimizer, update_num)
    fault("train.forward")
    counts_for_nothing = is_dummy(sample)
    if run is not None:
        run.guard.see_micro_batch(sample)
    loss, sample_size, logged = stock(
        self, sample, model, criterion, optimizer, update_num, ignore_grad=ignore_grad or counts_for_nothing
    )
    if counts_for_nothing:
        loss, sample_size, logged = without_dummy(loss, sample_size, logged)
    if run is not None:
        run.guard.see_loss(loss, sample_size)
    return loss, sample_size, logged


def _train_in_stages(
    run: MoERun, samples: list[Any], model: Any, criterion: Any, optimizer: Any, update_num: int
) -> tuple[Any, Any, dict[str, Any]]:
    for sample in samples:
        run.guard.see_micro_batch(sample)
    model.train()
    model.set_num_updates(update_num)
    loss, sample_size, logged = train_in_stages(
        samples, model, run.decoder, criterion, optimizer, run.guard.see_hidden
    )
    run.guard.see_loss(loss, sample_size)
    return loss, sample_size, logged


@seam(
    "fairseq.tasks.fairseq_task:FairseqTask.valid_step",
    signature="(self, sample, model, criterion)",
    stock_does="as train_step; fairseq-validate passes it an empty batch where a rank has none",
    breaks="as train_step; the criterion fails on the empty batch",
    we_do="as train_step; a dummy in the place of the empty batch",
    test="tests/distributed/test_uneven_batches.py",
)
def valid_step(
    stock: Callable[..., Any], self: Any, sample: Any, model: Any, criterion: Any
) -> tuple[Any, Any, dict[str, Any]]:
    fault("valid.forward")
    decoder = moe_decoder(model)
    if not sample and decoder is not None:
        sample = dummy_batch(self.target_dictionary, add_bos_token=False)
    if decoder is not None and decoder.stage.is_piped:
        model.eval()
        with torch.no_grad():
            return evaluate_in_stages(sample, model, decoder, criterion)
    loss, sample_size, logged = stock(self, sample, model, criterion)
    return without_dummy(loss, sample_size, logged) if is_dummy(sample) else (loss, sample_size, logged)


@seam(
    "fairseq.tasks.fairseq_task:FairseqTask.optimizer_step",
    signature="(self, optimizer, model, update_num)",
    stock_does="resets the peak memory counter before anyone else can log it",
    breaks="the branch's cuda_gb_allocated, cuda_gb_reserved and cuda_gb_free are missing",
    we_do="log them right after the optimizer's step, on GPUs",
    test="none on CPU; logged on GPUs only",
)
def optimizer_step(
    stock: Callable[..., Any], self: Any, optimizer: Any, model: nn.Module, update_num: int
) -> None:
    stock(self, optimizer, model, update_num)
    decoder = moe_decoder(model)
    if decoder is not None:
        for router in decoder.routers():
            router.update_bias()
    if torch.cuda.is_available() and decoder is not None and next(model.parameters()).is_cuda:
        gb = 1024.0**3
        allocated = torch.cuda.max_memory_allocated() / gb
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / gb
        for name, value in (
            ("cuda_gb_allocated", allocated),
            ("cuda_gb_reserved", torch.cuda.max_memory_reserved() / gb),
            ("cuda_gb_free", total - allocated),
        ):
            metrics.log_scalar(name, value, priority=1500, round=1, weight=0)


@seam(
    "fairseq.trainer:Trainer.train_step",
    signature="(self, samples, raise_oom)",
    stock_does="shows numbers per update, no tensors; on several ranks, goes on alone after running out of "
    "memory, and saves crash.pt after other errors",
    breaks="the load of each expert of each layer is not to be seen; the other ranks wait for this one in an "
    "exchange, while it waits for them in another",
    we_do="append the load to moe_load.jsonl in the save directory every --log-interval updates, and profile the "
    "updates that are asked for; every error of one of several ranks ends it, without a word to the others",
    test="tests/reliability/test_r22_lost_rank.py",
)
def trainer_train_step(stock: Callable[..., Any], self: Any, samples: Any, raise_oom: bool = False) -> Any:
    run = run_of(self)
    if run is None:
        return stock(self, samples, raise_oom)
    for router in run.decoder.routers():
        router.begin_update()
    run.guard.begin_update()
    is_piped = run.decoder.stage.is_piped
    # Stock would reduce each micro-batch.
    if run.sharding is not None and self.data_parallel_world_size == 1 and not is_piped:
        self.model.begin_update(len(samples))
    watchdog = current_watchdog()
    if watchdog is not None:
        watchdog.update = self.get_num_updates() + 1
    note_background_save(run)
    if is_piped:
        samples = composite(samples)
    with _no_crash_checkpoint(self), profiled(run.profiler, self):
        output = stock(self, samples, raise_oom or world_size() > 1)
    if run.guard.all_have_background_save:
        finish_background_save(run)
    if run.guard.is_first_update:
        run.guard.is_first_update = False
        _set_timeouts(self, run, 1.0)
    update = self.get_num_updates()
    if output is None or update % self.cfg.common.log_interval != 0 or not self.is_data_parallel_master:
        return output
    meters = metrics.get_meters("train_inner")
    if meters is not None and LOAD_KEY in meters:
        write_expert_load(self, run.decoder, meters[LOAD_KEY].sum, split="train")
    return output


def _set_timeouts(trainer: Any, run: MoERun, factor: float) -> None:
    seconds = factor * run.guard.config.collective_timeout_sec
    set_collective_timeout(seconds, [trainer.data_parallel_process_group, *run.mesh.groups])


@contextmanager
def _no_crash_checkpoint(trainer: Any) -> Iterator[None]:
    """Keep stock from saving crash.pt: that takes all ranks, and the others do not know of the trouble here."""
    trainer.save_checkpoint = lambda filename, extra_state: None  # stock calls it inside for crash.pt only
    try:
        yield
    finally:
        del trainer.save_checkpoint


@seam(
    "fairseq.trainer:Trainer.get_valid_iterator",
    signature="(self, subset, disable_iterator_cache)",
    stock_does="uses --num-workers for validation too",
    breaks="the branch's --num-workers-valid does not exist",
    we_do="honour it when it is given",
    test="tests/e2e/test_commands.py",
)
def get_valid_iterator(
    stock: Callable[..., Any], self: Any, subset: str, disable_iterator_cache: bool = False
) -> Any:
    num_workers = getattr(self.cfg.model, "num_workers_valid", None)
    if num_workers is None:
        return stock(self, subset, disable_iterator_cache)
    with _replaced(self.cfg.dataset, "num_workers", num_workers):
        return stock(self, subset, disable_iterator_cache)


@contextmanager
def _replaced(config: Any, name: str, value: Any) -> Any:
    before = config[name]
    config[name] = value
    try:
        yield
    finally:
        config[name] = before
