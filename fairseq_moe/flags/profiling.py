"""Declare the flags that say which updates of which ranks are profiled, and refuse what names none."""

import functools
from dataclasses import dataclass
from typing import Any

from fairseq_moe.flags.records import (
    Group,
    Range,
    changed_fields,
    flag,
    flag_name,
    getter,
    given_fields,
    ranges,
    words,
)

__all__ = ["ProfileConfig", "nsys_problem", "profile_problems"]

_flag = functools.partial(flag, Group.PROFILING)
_AN_UPDATE: Range = (lambda update: update >= 1, "the number of an update, from 1")
_RANGES: dict[str, Range] = {"profile_step_start": _AN_UPDATE, "profile_step_end": _AN_UPDATE}


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """Hold the flags about profiles; without both updates nothing is profiled."""

    profile_step_start: int | None = _flag(None, "first update to profile (from 1)")
    profile_step_end: int | None = _flag(None, "last update to profile, which is profiled too")
    profile_ranks: str | None = _flag(None, "ranks to profile, such as 0 or 0 3 (default: 0)")
    use_pytorch_profiler: bool = _flag(
        False,
        "profile with torch: a trace in the save directory's profile/ and a table in the log (default: mark the "
        "updates for nsys)",
    )

    @classmethod
    def from_args(cls, args: Any) -> "ProfileConfig":
        """Read the fields that ``args`` (namespace, config, mapping) has; the others keep their defaults."""
        return cls(**given_fields(cls, args))

    @property
    def updates(self) -> range | None:
        """Return the numbers of the updates to profile; None: none are."""
        if self.profile_step_start is None or self.profile_step_end is None:
            return None
        return range(self.profile_step_start, self.profile_step_end + 1)

    @property
    def ranks(self) -> list[int]:
        """List the ranks to profile."""
        return [int(word) for word in words(self.profile_ranks or "0")]

    def problems(self, *, world_size: int) -> list[str]:
        """List one sentence per value that cannot be honoured.

        Args:
            world_size: number of ranks that take part.
        """
        return [*ranges(self, _RANGES), *self._window_problems(), *self._rank_problems(world_size)]

    def _window_problems(self) -> list[str]:
        first, last = self.profile_step_start, self.profile_step_end
        if first is None and last is None:
            names = ", ".join(flag_name(name) for name in changed_fields(self))
            return [f"{names}: no update is named; add --profile-step-start and --profile-step-end."]
        if first is None or last is None:
            given, missing = ("start", "end") if last is None else ("end", "start")
            return [f"--profile-step-{given} {first or last} needs --profile-step-{missing}; add it."]
        if first > last:
            return [
                f"--profile-step-start is {first} and --profile-step-end {last}, expected an end that is not before "
                "the start: both updates are profiled."
            ]
        return []

    def _rank_problems(self, world_size: int) -> list[str]:
        listed = words("0" if self.profile_ranks is None else self.profile_ranks)
        if not listed or not all(word.isdecimal() for word in listed):
            return [f"--profile-ranks is {self.profile_ranks!r}, expected numbers of ranks such as 0 3."]
        beyond = [word for word in listed if int(word) >= world_size]
        if not beyond:
            return []
        there_are = f"ranks 0 to {world_size - 1}" if world_size > 1 else "rank 0 alone"
        return [
            f"--profile-ranks names {', '.join(beyond)}, and this run has {there_are}; leave out the others."
        ]


def profile_problems(cfg: Any, *, has_experts: bool, world_size: int) -> list[str]:
    """List one sentence per reason why a run cannot be profiled as its flags ask.

    Args:
        cfg: a whole fairseq configuration.
        has_experts: of the model.
        world_size: number of ranks that take part.
    """
    config = ProfileConfig.from_args(getattr(cfg, "model", None) or {})
    given = changed_fields(config)
    if not given:
        return []
    if not has_experts:
        names = ", ".join(flag_name(name) for name in given)
        return [f"{names}: no layer has experts, and only models with experts are profiled; leave it out."]
    found = config.problems(world_size=world_size)
    if getter(getattr(cfg, "common", None) or {})("cpu") and not config.use_pytorch_profiler:
        found.append(nsys_problem())
    return found


def nsys_problem() -> str:
    """Say why updates of a run on CPUs are not marked for nsys."""
    return (
        "--profile-step-start without --use-pytorch-profiler marks updates for nsys, which needs a GPU, and this run "
        "has none; add --use-pytorch-profiler."
    )
