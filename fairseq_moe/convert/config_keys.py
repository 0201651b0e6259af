"""Reading a config.json key by key, so that what nobody has read can be refused by name."""

from typing import Any

from fairseq_moe.convert.spec import Rope
from fairseq_moe.errors import ConfigError
from fairseq_moe.modules.rope import YarnConfig

__all__ = ["ConfigKeys", "rope_keys"]

# Of no effect on what the model computes from its weights, in any of the families.
_WITHOUT_EFFECT = frozenset(
    {
        "_name_or_path", "architectures", "auto_map", "bos_token_id", "chunk_size_feed_forward", "dtype",
        "eos_token_id", "ep_size", "id2label", "is_encoder_decoder", "label2id", "max_window_layers",
        "model_type", "output_attentions", "output_hidden_states", "output_router_logits", "pad_token_id",
        "pretraining_tp", "problem_type", "quantization_config", "return_dict", "torch_dtype",
        "transformers_version", "use_cache",
    }
)  # fmt: skip
_YARN_KEYS = {
    "factor": "factor",
    "original_max_position_embeddings": "original_max_positions",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
    "attention_factor": "attention_factor",
}
_REQUIRED: Any = object()


class ConfigKeys:
    """A config.json that remembers which of its keys were read, and what was wrong with them.

    Args:
        values: the parsed file.
        source: its name, for messages.
    """

    def __init__(self, values: dict[str, Any], *, source: str) -> None:
        self.values = values
        self.source = source
        self.problems: list[str] = []
        self._read: set[str] = set()

    def _value(self, names: tuple[str, ...], default: Any) -> Any:
        self._read.update(names)
        for name in names:
            if self.values.get(name) is not None:
                return self.values[name]
        if default is _REQUIRED:
            self.problems.append(f"{self.source} has no {' or '.join(names)}, which this model needs.")
        return default

    def integer(self, *names: str, default: Any = _REQUIRED) -> Any:
        """The first of these keys that is there and not null; must be a positive integer."""
        value = self._value(names, default)
        if value is default:
            return 1 if value is _REQUIRED else value
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            self.problems.append(f"{self.source} has {names[0]} {value!r}, expected a number from 0 up.")
            return 1
        return value

    def number(self, name: str, default: Any = _REQUIRED) -> Any:
        """The same for real numbers."""
        value = self._value((name,), default)
        if value is default:
            return 1.0 if value is _REQUIRED else value
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.problems.append(f"{self.source} has {name} {value!r}, expected a number.")
            return 1.0
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """The same for true and false."""
        value = self._value((name,), default)
        if not isinstance(value, bool):
            self.problems.append(f"{self.source} has {name} {value!r}, expected true or false.")
        return bool(value)

    def integers(self, name: str) -> list[int]:
        """A list of integers; null means none."""
        value = self._value((name,), [])
        if not isinstance(value, list) or not all(isinstance(entry, int) for entry in value):
            self.problems.append(f"{self.source} has {name} {value!r}, expected a list of layers.")
            return []
        return value

    def fixed(self, name: str, *allowed: Any) -> None:
        """A key that may be absent or null, or have one of these values."""
        value = self._value((name,), None)
        if value is not None and value not in allowed:
            expected = " or ".join(repr(entry) for entry in allowed) if allowed else "no such key"
            self.problems.append(f"{self.source} has {name} {value!r}, expected {expected}.")

    def one_of(self, name: str, allowed: tuple[str, ...], default: Any = _REQUIRED) -> Any:
        """A key with one of these words."""
        value = self._value((name,), default)
        if value is not _REQUIRED and value not in allowed:
            self.problems.append(f"{self.source} has {name} {value!r}, expected one of {', '.join(allowed)}.")
        return value if value in allowed else allowed[0]

    def ignore(self, *names: str) -> None:
        """Keys without effect in this family."""
        self._read.update(names)

    def rope(self, *, interleaved: bool) -> Rope:
        """Positions, from the form of transformers 4 (rope_theta, rope_scaling) or 5 (rope_parameters)."""
        self._read.update({"rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"})
        self.fixed("partial_rotary_factor", 1, 1.0)
        forms = []
        new = self.values.get("rope_parameters")
        if new is not None:
            forms.append(new if isinstance(new, dict) else {"rope_type": new})
        if self.values.get("rope_theta") is not None:
            scaling = self.values.get("rope_scaling") or {}
            forms.append({"rope_theta": self.values["rope_theta"], **scaling})
        if not forms:
            self.problems.append(f"{self.source} has neither rope_parameters nor rope_theta.")
            return Rope(theta=1.0)
        found = [self._rope(form, interleaved) for form in forms]
        if any(rope != found[0] for rope in found):
            self.problems.append(
                f"{self.source} has rope_parameters {new!r}, which contradicts its rope_theta and rope_scaling."
            )
        return found[0]

    def _rope(self, form: dict[str, Any], interleaved: bool) -> Rope:
        form = {key: value for key, value in form.items() if value is not None}
        kinds = {form.pop(key) for key in ("rope_type", "type") if key in form} or {"default"}
        theta, kind = form.pop("rope_theta", None), " and ".join(sorted(map(str, kinds)))
        if not isinstance(theta, int | float):
            self.problems.append(f"{self.source} has rope_theta {theta!r}, expected a number.")
            theta = 1.0
        yarn = None
        if kind not in ("default", "yarn"):
            self.problems.append(f"{self.source} has rope type {kind!r}, expected default or yarn.")
            form = {}
        elif kind == "yarn":
            for needed in ("factor", "original_max_position_embeddings"):
                if needed not in form:
                    self.problems.append(f"{self.source} has rope type yarn without {needed}.")
            form = {"factor": 1.0, "original_max_position_embeddings": 1, **form}
            if form.get("truncate") is True:
                del form["truncate"]
            yarn = YarnConfig(**{ours: form.pop(key) for key, ours in _YARN_KEYS.items() if key in form})
        form.pop("partial_rotary_factor", None) if form.get("partial_rotary_factor") == 1 else None
        if form:
            self.problems.append(
                f"{self.source} has the rope setting {', '.join(sorted(form))}, which fairseq_moe does not "
                f"know for rope type {kind}."
            )
        return Rope(theta=float(theta), interleaved=interleaved, yarn=yarn)

    def finish(self) -> None:
        """Refuse what was wrong and what nobody has read.

        Raises:
            ConfigError: with a sentence for each problem.
        """
        unread = sorted(
            key
            for key, value in self.values.items()
            if key not in self._read and key not in _WITHOUT_EFFECT and value is not None
        )
        self.problems += [
            f"{self.source} has the key {key} ({self.values[key]!r}), which fairseq_moe does not know; remove "
            "it if it does not change what the model computes."
            for key in unread
        ]
        if self.problems:
            raise ConfigError(self.problems)


def rope_keys(rope: Rope) -> dict[str, Any]:
    """Both forms of ``rope`` for a config.json: transformers 4 would read theta as 10000 without the first."""
    if rope.yarn is None:
        scaling = None
    else:
        settings = {key: getattr(rope.yarn, ours) for key, ours in _YARN_KEYS.items()}
        settings = {key: value for key, value in settings.items() if value is not None}
        scaling = {"type": "yarn", "rope_type": "yarn", **settings}
    new = {key: value for key, value in (scaling or {"rope_type": "default"}).items() if key != "type"}
    return {
        "rope_theta": rope.theta,
        "rope_scaling": scaling,
        "rope_parameters": {**new, "rope_theta": rope.theta},
    }
