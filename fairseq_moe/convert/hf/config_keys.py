"""Read a config.json key by key, so that what nobody has read is carried along or refused by name."""

import math
import sys
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from fairseq_moe.convert.hf.harmless_keys import expectation, is_common, is_harmless
from fairseq_moe.convert.spec import Rope
from fairseq_moe.errors import ConfigError
from fairseq_moe.modules.blocks.rope import YarnConfig

__all__ = ["REQUIRED", "ConfigKeys", "rope_keys"]


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """Bound the numbers that a setting may be.

    Args:
        least: of them.
        is_open: ``least`` itself is not among them.
        is_whole: they are integers.
    """

    least: int
    is_open: bool = False
    is_whole: bool = False

    def __str__(self) -> str:
        bound = f"above {self.least}" if self.is_open else f"from {self.least} up"
        return f"a {'whole ' if self.is_whole else ''}number {bound}"

    def holds(self, value: Any) -> bool:
        """Tell whether ``value`` is one; NaN and what no float holds never are."""
        if isinstance(value, bool) or not isinstance(value, int if self.is_whole else int | float):
            return False
        return bool(self.least <= value <= sys.float_info.max) and not (self.is_open and value == self.least)


_POSITIVE, _NOT_NEGATIVE = _Kind(least=0, is_open=True), _Kind(least=0)
_THETA = _Kind(least=1, is_open=True)
_YARN_KEYS = {
    "factor": ("factor", _POSITIVE),
    "original_max_position_embeddings": ("original_max_positions", _Kind(least=1, is_whole=True)),
    "beta_fast": ("beta_fast", _POSITIVE),
    "beta_slow": ("beta_slow", _POSITIVE),
    "mscale": ("mscale", _NOT_NEGATIVE),
    "mscale_all_dim": ("mscale_all_dim", _NOT_NEGATIVE),
    "attention_factor": ("attention_factor", _POSITIVE),
}
_YARN_NEEDS = ("factor", "original_max_position_embeddings")
# transformers' default_theta; 10,000 for the others.
_OWN_THETA = {
    "ernie4_5_moe": 500_000.0, "gpt_oss": 150_000.0, "minimax_m2": 5_000_000.0, "mixtral": 1_000_000.0,
}  # fmt: skip
_PARTIAL = "partial_rotary_factor"
# Of type dynamic with alpha, which transformers looks at alone.
_WITH_ALPHA = ("rope_type", "type", "alpha", "factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
_ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_parameters")
# By the dictionary and by the writer of config.json.
_READ_ELSEWHERE = frozenset({"bos_token_id", "dtype", "eos_token_id", "torch_dtype"})
REQUIRED: Any = object()  # a default: the key must be there


class ConfigKeys:
    """Remember which keys of a config.json were read, and what was wrong with them.

    A key that is null is not one that is absent: transformers then computes with None in place of its default. So
    null counts as the default where that is None, or false and empty as None is, or where ``null`` says so; elsewhere
    it is refused.

    Args:
        values: the parsed file.
        source: its name, for messages.
        ignored: keys that the user says change nothing.
    """

    def __init__(self, values: dict[str, Any], *, source: str, ignored: Collection[str] = ()) -> None:
        self.values = values
        self.source = source
        self.ignored = ignored
        self.problems: list[str] = []
        self._read: set[str] = set()

    def _value(self, names: tuple[str, ...], default: Any, *, null: bool = False) -> Any:
        self._read.update(names)
        given = {name: self.values[name] for name in names if self.values.get(name) is not None}
        if given:
            first, *others = given.values()
            if any(other != first for other in others):
                self.refuse(f"{_listed(given)}, two names of one setting; expected the same value in both.")
            return first
        if default is REQUIRED:
            self.problems.append(f"{self.source} has no {' or '.join(names)}, which this model needs.")
        elif default and not null and any(name in self.values for name in names):
            name = next(name for name in names if name in self.values)
            self.refuse(
                f"{name} null, which transformers does not take for its default; expected {default!r}."
            )
        return default

    def integer(self, *names: str, default: Any = REQUIRED, least: int = 1, null: bool = False) -> Any:
        """Read the first of these keys that is there and not null; must be an integer of at least ``least``."""
        value = self._value(names, default, null=null)
        if value is default:
            return 1 if value is REQUIRED else value
        return value if self._is(names[0], value, _Kind(least=least, is_whole=True)) else 1

    def number(
        self, name: str, default: Any = REQUIRED, *, positive: bool = False, null: bool = False
    ) -> Any:
        """Read a real number; not negative, and with ``positive`` not 0 either."""
        value = self._value((name,), default, null=null)
        if value is default:
            return 1.0 if value is REQUIRED else value
        return float(value) if self._is(name, value, _POSITIVE if positive else _NOT_NEGATIVE) else 1.0

    def _is(self, what: str, value: Any, kind: _Kind) -> bool:
        is_good = kind.holds(value)
        if not is_good:
            self.refuse(f"{what} {value!r}, expected {kind}.")
        return is_good

    def refuse(self, what: str) -> None:
        """Say that a setting is wrong; two forms of one may be wrong in the same way, which is said once."""
        problem = f"{self.source} has {what}"
        if problem not in self.problems:
            self.problems.append(problem)

    def flag(self, name: str, default: bool) -> bool:
        """Read true or false."""
        value = self._value((name,), default)
        if not isinstance(value, bool):
            self.problems.append(f"{self.source} has {name} {value!r}, expected true or false.")
        return bool(value)

    def integers(self, name: str) -> list[int]:
        """Read a list of integers; null means none."""
        value = self._value((name,), [])
        if not isinstance(value, list) or not all(type(entry) is int for entry in value):
            self.problems.append(f"{self.source} has {name} {value!r}, expected a list of layers.")
            return []
        return value

    def per_layer_integer(self, *names: str, num_layers: int) -> Any:
        """Read a whole number of at least 1, given once or, the same, for every layer."""
        value = self._value(names, REQUIRED)
        if isinstance(value, list):
            if len(value) != num_layers or any(entry != value[0] for entry in value):
                self.refuse(f"{names[0]} {value!r}, expected one number, or the same for each of the layers.")
                return 1
            value = value[0]
        is_good = value is not REQUIRED and self._is(names[0], value, _Kind(least=1, is_whole=True))
        return value if is_good else 1

    def fixed(self, name: str, *allowed: Any, why: str) -> None:
        """Refuse a key that is there with none of these values, and say why; null may be where one of them is false."""
        value = self._value((name,), None)
        if name not in self.values or value in allowed:
            return
        if value is None and not (allowed and all(allowed)):
            return
        expected = " or ".join(repr(entry) for entry in allowed) if allowed else "null"
        self.refuse(f"{name} {_shown(value)}, expected {expected}: {why}.")

    def one_of(self, name: str, allowed: tuple[str, ...], default: str, *, why: str) -> Any:
        """Read a key that has one of these words; ``why`` no other."""
        value = self._value((name,), default)
        if value not in allowed:
            self.refuse(f"{name} {value!r}, expected one of {', '.join(allowed)}: {why}.")
        return value if value in allowed else allowed[0]

    def ignore(self, *names: str) -> None:
        """Count keys as read that have no effect in this family."""
        self._read.update(names)

    def rope(self, *, interleaved: bool, fraction: float | None = None, alpha_dim: int | None = None) -> Rope:
        """Read positions, from the form of transformers 4 (rope_theta, rope_scaling) or 5 (rope_parameters).

        Args:
            interleaved: neighbouring values turn as a pair.
            fraction: share of a head that turns where no key says so; None: all of it, whatever a key says.
            alpha_dim: size of a head in a family whose type ``dynamic`` with ``alpha`` stretches theta once for all;
                None: no such family.
        """
        self._read.update(_ROPE_KEYS)
        if fraction is None:
            self.fixed(_PARTIAL, 1, 1.0, why="all of a head turns in this family")
        else:
            fraction = self.number(_PARTIAL, fraction, positive=True)
        wrong = [
            name
            for name in ("rope_scaling", "rope_parameters")
            if not isinstance(self.values.get(name), dict | None)
        ]
        for name in wrong:
            self.refuse(f"{name} {self.values[name]!r}, expected a JSON object.")
        forms = [] if wrong else self._rope_forms(fraction)
        if not forms:
            if not wrong:
                self.problems.append(f"{self.source} has neither rope_parameters nor rope_theta.")
            return Rope(theta=1.0)
        known = len(self.problems)
        found = [
            self._rope(self._without_alpha(form, alpha_dim), interleaved, knows_parts=fraction is not None)
            for form in forms
        ]
        if len(self.problems) == known and any(rope != found[0] for rope in found):
            settings = (f"{name} {self.values.get(name)!r}" for name in _ROPE_KEYS)
            self.refuse(f"{', '.join(settings)}, which contradict one another.")
        return found[0]

    def _rope_forms(self, fraction: float | None) -> list[dict[str, Any]]:
        """List each reading: transformers 4's (theta and rope_scaling) and 5's (rope_scaling or rope_parameters).

        Args:
            fraction: that all of them have in common unless they say otherwise; None: the family knows none.
        """
        # A null is as good as absent, but for truncate: transformers takes it for false, and absent for true.
        theta, scaling, parameters = (
            _without_nulls(self.values.get(name), keep="truncate") for name in _ROPE_KEYS
        )
        top = {} if theta is None else {"rope_theta": theta}
        shared = {} if fraction is None else {_PARTIAL: fraction}
        forms = []
        if scaling is not None:
            # 5 does not look into rope_parameters then: without theta elsewhere it takes the family's own.
            below = (
                {"rope_theta": _OWN_THETA.get(str(self.values.get("model_type")), 10_000.0)}
                if parameters
                else {}
            )
            forms.append({**shared, **below, **top, **scaling})
        if parameters is not None:
            forms.append({**shared, **top, **parameters})
        if top:
            forms.append({**(scaling or {}), **top, **shared})
        return [form for index, form in enumerate(forms) if form not in forms[:index]]

    def _without_alpha(self, form: dict[str, Any], dim: int | None) -> dict[str, Any]:
        """Turn the settings of type ``dynamic`` with ``alpha`` into those of plain positions with a larger theta."""
        kinds = {form[key] for key in ("rope_type", "type") if isinstance(form.get(key), str)}
        if dim is None or kinds != {"dynamic"} or not form.get("alpha"):
            return form
        theta = form.get("rope_theta")
        if (
            not self._is("rope_theta", theta, _THETA)
            or not self._is("alpha", form["alpha"], _POSITIVE)
            or dim < 3
        ):
            return {"rope_theta": 2.0}
        assert theta is not None
        try:
            stretched = theta * form["alpha"] ** (dim / (dim - 2))
        except OverflowError:
            stretched = math.inf
        rest = {key: value for key, value in form.items() if key not in (*_WITH_ALPHA, "rope_theta")}
        return rest | {"rope_theta": stretched}

    def _rope(self, form: dict[str, Any], interleaved: bool, *, knows_parts: bool) -> Rope:
        theta = form.pop("rope_theta", None)
        if not self._is("rope_theta", theta, _THETA):
            theta = 1.0
        kinds = [form.pop(key) for key in ("rope_type", "type") if key in form] or ["default"]
        kind = kinds[0] if kinds[0] == kinds[-1] else " and ".join(map(str, kinds))
        yarn = None
        if kind not in ("default", "yarn"):
            self.refuse(f"rope type {kind!r}, expected default or yarn.")
            form = {}
        elif kind == "yarn":
            yarn = self._yarn(form)
        else:
            form = _without_nulls(form)
        fraction = self._fraction(form) if knows_parts or form.get(_PARTIAL) == 1 else 1.0
        if form:
            self.refuse(
                f"the rope setting {', '.join(sorted(form))}, which fairseq_moe does not know for rope type {kind}."
            )
        return Rope(theta=float(theta), interleaved=interleaved, fraction=fraction, yarn=yarn)

    def _fraction(self, form: dict[str, Any]) -> float:
        """Take the share of a head that turns out of ``form``."""
        value = form.pop(_PARTIAL, 1.0)
        if _POSITIVE.holds(value) and value <= 1:
            return float(value)
        self.refuse(f"{_PARTIAL} {_shown(value)}, expected a number above 0 and at most 1.")
        return 1.0

    def _yarn(self, form: dict[str, Any]) -> YarnConfig:
        """Take YaRN's settings out of ``form``."""
        settings: dict[str, Any] = {"factor": 1.0, "original_max_positions": 1}
        for key, (ours, kind) in _YARN_KEYS.items():
            if key in form:
                value = form.pop(key)
                if self._is(f"the rope setting {key}", value, kind):
                    settings[ours] = value
            elif key in _YARN_NEEDS:
                self.refuse(f"rope type yarn without {key}.")
        truncate = form.pop("truncate", True)
        if not isinstance(truncate, bool | None):
            self.refuse(f"the rope setting truncate {_shown(truncate)}, expected true or false.")
        return YarnConfig(**settings, truncate=bool(truncate))

    def finish(self) -> list[str]:
        """Refuse what was wrong and what nobody has read; return the keys that are carried along unread.

        Raises:
            ConfigError: with a sentence for each problem.
        """
        family = str(self.values.get("model_type"))
        unread = {key: value for key, value in sorted(self.values.items()) if key not in self._read}
        listed = {key for key, value in unread.items() if is_harmless(family, key, value)}
        unknown = [key for key, value in unread.items() if value is not None and key not in listed]
        for key in (key for key in unknown if key not in self.ignored):
            fault = expectation(family, key) or f"which fairseq_moe does not know for {family}"
            self.problems.append(
                f"{self.source} has the key {key} ({self.values[key]!r}), {fault}; pass --ignore-config-key {key} if "
                "it does not change what the model computes."
            )
        for key in self.ignored:
            if key not in self.values:
                self.problems.append(f"{self.source} has no key {key} that --ignore-config-key could ignore.")
            elif key in self._read | _READ_ELSEWHERE:
                self.problems.append(
                    f"{self.source} has the key {key}, which the conversion reads; --ignore-config-key is for keys "
                    "that it does not know."
                )
        if self.problems:
            raise ConfigError(self.problems)
        return [key for key in unread if key in self.ignored or not is_common(family, key, self.values[key])]


def _shown(value: Any) -> str:
    return "null" if value is None else repr(value)


def _listed(values: dict[str, Any]) -> str:
    return " and ".join(f"{name} {value!r}" for name, value in values.items())


def _without_nulls(value: Any, *, keep: str | None = None) -> Any:
    """Drop entries that are null from a dictionary, but for the key ``keep``; return anything else as it is."""
    if not isinstance(value, dict):
        return value
    return {key: entry for key, entry in value.items() if entry is not None or key == keep}


def rope_keys(rope: Rope, *, knows_parts: bool = False) -> dict[str, Any]:
    """Write both forms of ``rope`` for a config.json: transformers 4 would read theta as 10000 without the first.

    Args:
        rope: what to write.
        knows_parts: the family has heads that turn in part, and takes a share of its own where none is named.
    """
    if rope.yarn is None:
        scaling = None
    else:
        settings = {key: getattr(rope.yarn, ours) for key, (ours, _) in _YARN_KEYS.items()}
        settings = {key: value for key, value in settings.items() if value is not None}
        if not rope.yarn.truncate:
            settings["truncate"] = False
        scaling = {"type": "yarn", "rope_type": "yarn", **settings}
    new = {key: value for key, value in (scaling or {"rope_type": "default"}).items() if key != "type"}
    part = {_PARTIAL: rope.fraction} if knows_parts else {}
    return {
        **part,
        "rope_theta": rope.theta,
        "rope_scaling": scaling,
        "rope_parameters": {**new, **part, "rope_theta": rope.theta},
    }
