"""Say which settings do not go together: a sentence each, in terms of keys, without fairseq.

What flags of fairseq-train say against one another is in ``flag_checks``, what cannot be written as a script in the
renderer; nothing is looked at twice.
"""

import difflib
from collections.abc import Iterator, Mapping

from fairseq_moe.launch.command import data_of
from fairseq_moe.launch.layers import Layered
from fairseq_moe.launch.sizes import Sizes
from fairseq_moe.planner.devices import DEVICES

__all__ = ["mount_of", "secret_problems", "setting_notes", "setting_problems"]


def setting_problems(layered: Layered, sizes: Sizes, *, has_key: bool) -> list[str]:
    """List why settings cannot be honoured together.

    Args:
        layered: all settings.
        sizes: that follow from them.
        has_key: whether the environment has a key for Weights & Biases.
    """
    found = [*_model(layered), *_ranks(layered, sizes), *_batches(layered, sizes), *_starting(layered)]
    return [*found, *_watching(layered, has_key=has_key)]


def _model(layered: Layered) -> Iterator[str]:
    if layered["arch"] is None and "arch" not in layered.map("flags"):
        yield "no model is named; give a recipe first, as in fairseq-moe-launch mixtral_8x7b (--list shows them)."
    name, known = layered["dataset"], layered.map("datasets")
    if name is not None and layered["data_path"] is None and name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.3)
        hint = f"did you mean {near[0]}?" if near else "give data_path, or datasets in the cluster's file."
        yield f"dataset is {name!r}, of which datasets has no path; {hint}"


def _ranks(layered: Layered, sizes: Sizes) -> Iterator[str]:
    if sizes.num_ranks % sizes.num_batch_ranks:
        axes = " x ".join(f"{key} {layered[key]}" for key in ("tp", "pp", "cp"))
        yield (
            f"{layered['nodes']} nodes x {sizes.ranks_per_node} ranks are {sizes.num_ranks}, expected a multiple of "
            f"{axes} = {sizes.num_batch_ranks}; change nodes, or an axis."
        )
    both = layered["layers_per_vp"] is not None and layered["vpp"] > 1
    if both and layered.ranks["layers_per_vp"] == layered.ranks["vpp"]:
        yield "vpp and layers_per_vp both say how many stages a pipeline rank has; leave one of the two out."
    if layered["device"].lower() not in DEVICES:
        yield f"device is {layered['device']!r}, expected one of {', '.join(DEVICES)}."
    if layered["precision"] == "fp8" and sizes.on_cpu:
        yield "precision fp8 needs GPUs; on CPUs flags.moe-fp8=emulate shows what it does to losses."


def _batches(layered: Layered, sizes: Sizes) -> Iterator[str]:
    mbs, gbs = layered["mbs"], layered["gbs"]
    if gbs is not None and mbs is None:
        yield f"gbs is {gbs}, of micro-batches without a size; give mbs."
    elif gbs is not None and gbs % (mbs * sizes.num_data_ranks):
        yield (
            f"gbs is {gbs}, expected a multiple of mbs {mbs} x {sizes.num_data_ranks} data ranks = "
            f"{mbs * sizes.num_data_ranks}."
        )
    for key in ("train_samples", "warmup_samples"):
        if layered[key] is not None and gbs is None:
            yield f"{key} counts sequences, of which an update has gbs; give that, or flags for updates."
    if layered["train_samples"] is not None and gbs is not None and layered["train_samples"] < gbs:
        yield f"train_samples is {layered['train_samples']}, which is less than an update's gbs {gbs}."


def _starting(layered: Layered) -> Iterator[str]:
    if layered["pretrain"] is False and layered["load_path"] is None:
        yield "pretrain is false, and there is no load_path to start from; give one, or leave pretrain out."


def _watching(layered: Layered, *, has_key: bool) -> Iterator[str]:
    if layered["wandb_mode"] == "online" and not has_key:
        yield "wandb_mode is online, and the environment has no WANDB_API_KEY; set it, or take offline."
    if len(layered["profile_steps"]) != 2:
        yield f"profile_steps is {layered['profile_steps']}, expected a first and a last update."


def mount_of(text: str) -> tuple[str, str]:
    """Read a mount: what is outside, and its path inside, which is the same where none is named."""
    outside, colon, inside = text.partition(":")
    return outside, inside if colon else outside


def secret_problems(layered: Layered, words: tuple[str, ...], environ: Mapping[str, str]) -> list[str]:
    """Refuse values of secrets where they would be written down; the sentences do not repeat them.

    Args:
        layered: all settings.
        words: all that is written down: the command, and values of variables.
        environ: that has the secrets.
    """
    found = [
        f"env.{name} would write a secret into files; set {name} in the environment, which ranks inherit."
        for name in layered["secrets"]
        if name in layered.map("env")
    ]
    for name in layered["secrets"]:
        value = environ.get(name)
        if value and any(value in word for word in words):
            found.append(
                f"the value of {name} is part of a setting or flag, and would be written down; leave it out."
            )
    return found


def setting_notes(layered: Layered) -> Iterator[str]:
    """Say, a sentence each, which settings do something else than they seem to, or nothing."""
    if layered["dispatcher"] in ("flex", "deepep", "hybridep"):
        yield f"dispatcher {layered['dispatcher']} is alltoall here: the same exchange, without a vendor's kernels."
    if layered["grouped_gemm"] is False:
        yield "grouped_gemm false does nothing: the expert kernel is chosen by device, dtype and sizes."
    seq_len, chunks = layered["seq_len"], 2 * layered["cp"]
    if seq_len is not None and layered["cp"] > 1 and seq_len % chunks:
        yield (
            f"seq_len {seq_len} is no multiple of 2 x cp {layered['cp']}: each sequence is filled up to "
            f"{-(-seq_len // chunks) * chunks} positions."
        )
    if layered["pretrain"] and layered["load_path"] is not None:
        yield "load_path is not read: pretrain is true, so training starts from random weights."
    if layered["data_path"] is not None and layered["dataset"] is not None:
        yield f"dataset {layered['dataset']} is not looked up: data_path says what is trained on."
    if layered["tokenizer_model"] is not None and data_of(layered) is None:
        yield "tokenizer_model does nothing on synthetic data."
