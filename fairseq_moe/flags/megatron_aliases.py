"""Declare Megatron's arguments that choose nothing here: old names, and what always holds.

One entry per argument, or value. ``alias``: another one is set, with a warning. ``no_op``: what it asks for always
holds or does not apply here; accepted with a warning.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, make_dataclass
from typing import Any

from fairseq_moe.flags.records import Group, flag, flag_name, getter, words

__all__ = [
    "MEGATRON_ARGS",
    "MEGATRON_VALUES",
    "MegatronArg",
    "MegatronArgs",
    "argument_problems",
    "argument_warnings",
    "resolve_aliases",
]


@dataclass(frozen=True, kw_only=True)
class MegatronArg:
    """Describe one argument, or one of its values.

    Args:
        name: field name; the flag is ``--`` + name with dashes.
        kind: the type of its value.
        does: ``alias`` or ``no_op``.
        text: the argument, or value, that an alias stands for; or the reason.
        value: the entry is about this value only; None: about all.
    """

    name: str
    kind: type
    does: str
    text: str
    value: Any = None

    @property
    def flag(self) -> str:
        """Spell the argument as a user types it."""
        return flag_name(self.name)

    @property
    def help(self) -> str:
        """Tell in the command's help what the argument does."""
        if self.does == "alias":
            return f"old name of {flag_name(self.text)}"
        return f"does nothing: {self.text}"


def _arg(name: str, kind: type, does: str, text: str, *, value: Any = None) -> MegatronArg:
    return MegatronArg(name=name, kind=kind, does=does, text=text, value=value)


_SAME_EXCHANGE = "the exchange is that of --moe-token-dispatcher-type alltoall, without a vendor's kernels"

MEGATRON_ARGS = (
    _arg("moe_token_capacity_factor", float, "alias", "moe_expert_capacity_factor"),
    _arg(
        "moe_token_dropping",
        bool,
        "no_op",
        "tokens are dropped exactly when --moe-expert-capacity-factor is set",
    ),
    _arg("moe_grouped_gemm", bool, "no_op", "the expert kernel is chosen by device, dtype and sizes"),
    _arg("moe_permute_fusion", bool, "no_op", "rows are moved by index; there is no unfused path to replace"),
    _arg("moe_enable_deepep", bool, "no_op", _SAME_EXCHANGE),
    _arg("moe_flex_dispatcher_backend", str, "no_op", _SAME_EXCHANGE),
    _arg("use_dist_ckpt", bool, "no_op", "checkpoints are written by all ranks in parallel anyway"),
    _arg("auto_detect_ckpt_format", bool, "no_op", "formats are always detected"),
)

# The record that declares them, as the others do by hand.
MegatronArgs = make_dataclass(
    "MegatronArgs",
    [
        (
            entry.name,
            bool if entry.kind is bool else entry.kind | None,
            flag(Group.MEGATRON, False if entry.kind is bool else None, entry.help),
        )
        for entry in MEGATRON_ARGS
    ],
    frozen=True,
    kw_only=True,
)

# Single values of arguments that otherwise are what they are in Megatron: kernels of vendors for the same exchange, and
# an old name of it.
MEGATRON_VALUES = tuple(
    _arg("moe_token_dispatcher_type", str, "alias", "alltoall", value=value)
    for value in ("alltoall_seq", "flex", "deepep", "hybridep")
)


def _given(args: Any) -> Iterator[tuple[MegatronArg, Any]]:
    get = getter(args)
    for entry in MEGATRON_ARGS:
        value = get(entry.name)
        if value is not None and value is not False:
            yield entry, value
    for entry in MEGATRON_VALUES:
        if get(entry.name) == entry.value:
            yield entry, entry.value


def argument_problems(args: Any) -> list[str]:
    """List one sentence per alias that contradicts what it stands for."""
    found = []
    get = getter(args)
    for entry, value in _given(args):
        if entry.does == "alias" and entry.value is None and get(entry.text) not in (None, value):
            target = flag_name(entry.text)
            found.append(
                f"{entry.flag} {value} contradicts {target} {get(entry.text)}; leave out {entry.flag}."
            )
    return found


def argument_warnings(args: Any) -> list[str]:
    """List one sentence per argument that is accepted and does nothing by itself, or other than it seems to."""
    found = []
    for entry, value in _given(args):
        if entry.does == "no_op":
            found.append(f"{entry.flag} is accepted and does nothing: {entry.text}.")
        elif entry.does == "alias" and entry.value is None:
            found.append(f"{entry.flag} is an old name; use {flag_name(entry.text)}.")
        elif entry.does == "alias":
            found.append(f"{entry.flag} {value} stands for {entry.text} here; use that.")
    get = getter(args)
    return found if get("num_experts") is None else [*found, *_remarks(get)]


def _remarks(get: Callable[[str], Any]) -> Iterator[str]:
    """List what a user of Megatron's routing may not expect."""
    function = get("moe_router_score_function")
    if get("moe_router_pre_softmax") and function not in (None, "softmax"):
        yield (
            f"--moe-router-pre-softmax does nothing with --moe-router-score-function {function}, as in "
            "Megatron."
        )
    kinds = str(get("moe_router_load_balancing_type") or "aux_loss")
    if "expert_choice" in kinds:
        yield (
            "expert_choice is not causal: an expert chooses among all tokens of a batch, later ones "
            "included, so losses and perplexities are too good; generation falls back to token choice."
        )
    is_inert = "aux_loss" in kinds and all(
        not float(word) for word in words(get("moe_aux_loss_coeff") or "0")
    )
    if (
        is_inert
        and not get("moe_router_enable_expert_bias")
        and get("moe_router_force_load_balancing") is None
    ):
        yield (
            "nothing balances the experts: --moe-aux-loss-coeff is 0, as in Megatron unless it is given "
            "(1e-2 is a good start; --moe-router-load-balancing-type none silences this)."
        )


def resolve_aliases(values: dict[str, Any], args: Any) -> dict[str, Any]:
    """Replace aliases in ``values`` by what they stand for."""
    resolved = dict(values)
    for entry, value in _given(args):
        if entry.does == "alias" and entry.value is None:
            resolved.setdefault(entry.text, value)
        elif entry.does == "alias":
            resolved[entry.name] = entry.text
    return resolved
