"""Null, zero, false or absent settings of a config.json: refused, or the same model as transformers'.

Run with ``pytest tests/numerics/test_config_readings.py``. A tiny model of every family, its config.json in the form of
transformers 4 and 5; each key in it, each key that transformers' code of the family reads, and each setting of rope is
changed in turn. Where we still read the model that the unchanged file describes, transformers must compute with the
changed file what it computes with the unchanged one, to the bit; where we read another one, it is converted, and its
logits are compared.
"""

import copy
import dataclasses
import importlib
import inspect
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fairseq_moe.convert import from_hf
from fairseq_moe.convert.hf.families import read_config
from fairseq_moe.convert.verify import verify
from fairseq_moe.errors import CheckpointError, ConfigError
from tests.helpers.hf import HF_MODELS, hf_config, import_transformers, random_model

ABSENT: Any = object()
# Of each way to read positions one family: plain with half a head's pairs, YaRN of neighbours, YaRN without rounding
# and with a meaning of its own where nothing is said, heads that turn in part by either key, a theta with alpha.
WITH_ROPE = ("mixtral", "deepseek_v2", "deepseek_v3", "gpt_oss", "glm4_moe", "minimax_m2", "hunyuan_v1_moe")
CHANGES: dict[str, Any] = {"null": None, "zero": 0, "false": False, "absent": ABSENT}
ROPE_SETTINGS = (
    "rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale",
    "mscale_all_dim", "attention_factor", "truncate", "partial_rotary_factor",
)  # fmt: skip
Values = dict[str, Any]


def changed(values: Values, key: str, value: Any) -> Values:
    """``values`` with another value of one key, or without it."""
    rest = {name: entry for name, entry in values.items() if name != key}
    return rest if value is ABSENT else rest | {key: value}


def of_version_4(values: Values) -> Values:
    """The same settings as transformers 4 writes them."""
    rope = dict(values["rope_parameters"])
    above = {key: rope.pop(key) for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    rest = changed(values, "rope_parameters", ABSENT) | above
    return rest | {"rope_scaling": None if rope["rope_type"] == "default" else rope}


def read_by_transformers(name: str) -> set[str]:
    """Names that transformers' code looks up in a configuration of this family, or in any."""
    transformers = import_transformers()
    family = type(hf_config(name)).__module__.replace("configuration_", "modeling_")
    found = {field.name for field in dataclasses.fields(transformers.PretrainedConfig)}
    for module in (family, "transformers.masking_utils", "transformers.modeling_rope_utils"):
        source = inspect.getsource(importlib.import_module(module))
        found |= set(re.findall(r"config\.(\w+)", source)) | set(re.findall(r"config, \"(\w+)\"", source))
    return found


def all_changes(name: str, values: Values) -> Iterator[tuple[str, Values]]:
    old = of_version_4(values)
    for key in sorted(set(old) | read_by_transformers(name)):
        for label, value in CHANGES.items():
            yield f"{key} {label}", changed(old, key, value)
    own = [key for key in values["rope_parameters"] if key not in ROPE_SETTINGS]
    both = values | {"rope_scaling": old["rope_scaling"]}
    for style, given in {"4": old, "5": values, "both": both}.items():
        for key in ("rope_scaling", "rope_parameters"):
            for setting in (*ROPE_SETTINGS, *own):
                for label, value in CHANGES.items():
                    inner = changed(given.get(key) or {}, setting, value)
                    yield f"{style}: {key}.{setting} {label}", given | {key: inner}
            for inner in ({}, {"rope_type": "default"}, {"type": "default"}, {"rope_theta": 12345.0}):
                yield f"{style}: {key} {inner}", given | {key: inner}
                yield f"{style}: {key} {inner} alone", changed(given, "rope_theta", ABSENT) | {key: inner}


class Theirs:
    """What transformers computes with a config.json and the weights of the unchanged model."""

    def __init__(self, values: Values) -> None:
        self.state = random_model(their_config(values)).state_dict()
        self.logits = self.of(values)
        assert self.logits is not None

    def of(self, values: Values) -> torch.Tensor | None:
        """Logits; None where transformers fails, and none at all where its tensors are others."""
        ids = torch.randint(97, (2, 40), generator=torch.Generator().manual_seed(1))
        try:  # it raises all kinds
            model = import_transformers().AutoModelForCausalLM.from_config(
                their_config(values), attn_implementation="eager", experts_implementation="eager"
            )
        except Exception:
            return None
        found = model.load_state_dict(self.state, strict=False) if same_shapes(model, self.state) else None
        try:
            with torch.no_grad():
                logits: torch.Tensor = model.eval()(ids, use_cache=False)[0]
        except Exception:
            return None
        return logits if found is not None and not found[0] and not found[1] else torch.empty(0)


def their_config(values: Values) -> Any:
    mapping = import_transformers().models.auto.configuration_auto.CONFIG_MAPPING
    return mapping[values["model_type"]].from_dict(copy.deepcopy(values))


def same_shapes(model: Any, state: Values) -> bool:
    return all(
        tensor.shape == state[name].shape for name, tensor in model.state_dict().items() if name in state
    )


@pytest.mark.parametrize("name", sorted(HF_MODELS))
def test_a_changed_setting_is_refused_or_read_as_transformers_reads_it(name: str, tmp_path: Path) -> None:
    values: Values = hf_config(name).to_dict()
    if values["rope_parameters"]["rope_type"] == "yarn":
        # Pairs of values are stretched from number 0.3 to number 2.5, so that rounding these changes the model.
        values["rope_parameters"] |= {"beta_fast": 1.28, "beta_slow": 0.008}
    spec, theirs = read_config(values), Theirs(values)
    assert read_config(of_version_4(values)) == spec
    outcomes: Counter[str] = Counter()
    wrong = []
    others: dict[
        Any, torch.Tensor
    ] = {}  # other models that were converted and compared, with transformers' logits
    for index, (label, given) in enumerate(all_changes(name, values)):
        try:
            found = read_config(copy.deepcopy(given))
        except ConfigError:
            outcomes["refused"] += 1
            continue
        logits = theirs.of(given)
        if logits is None:
            outcomes["transformers fails"] += 1
        elif found == spec:
            outcomes["the same model"] += 1
            if not torch.equal(logits, theirs.logits):
                wrong.append(label)
        else:
            outcomes["another model"] += 1
            own = logits_of_its_own(given)
            if found not in others and is_converted(given, tmp_path / str(index)):
                others[found] = own
            if found in others and not torch.equal(own, others[found]):
                wrong.append(f"{label} (another model)")
    assert wrong == []
    assert outcomes["refused"] > (100 if name in WITH_ROPE else 30)
    assert outcomes["the same model"] > (100 if name in WITH_ROPE else 50)
    assert outcomes["another model"] > (3 if name in WITH_ROPE else 1)


def logits_of_its_own(values: Values) -> torch.Tensor:
    """What transformers computes with weights that this config.json implies."""
    with torch.no_grad():
        logits: torch.Tensor = random_model(their_config(values)).eval()(
            torch.arange(40)[None], use_cache=False
        )[0]
    return logits


def is_converted(values: Values, directory: Path) -> bool:
    """Convert and compare; False if the tensors of transformers' model are not those that we read config.json for."""
    random_model(their_config(values)).save_pretrained(directory / "hf")
    (directory / "hf" / "config.json").write_text(json.dumps(values))
    try:
        from_hf(directory / "hf", directory / "ours")
    except CheckpointError:
        return False
    return "verified" in verify(directory / "hf", directory / "ours")  # or it raises


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("deepseek_v3", {"rope_interleave": None}),
        ("deepseek_v3", {"norm_topk_prob": None}),
        ("mixtral", {"sliding_window": 0}),
        ("olmoe", {"is_causal": None}),
        ("qwen3_moe", {"rope_scaling": {"rope_type": "default"}}),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_these_tests_see_a_wrong_reading(name: str, change: Values) -> None:
    """Each was read once as if the key were not there; transformers computes something else with it."""
    values: Values = hf_config(name).to_dict()
    theirs = Theirs(values)
    logits = theirs.of(values | change)
    assert logits is not None and logits.numel() and not torch.equal(logits, theirs.logits)
    with pytest.raises(ConfigError) as caught:
        read_config(values | change)
    assert next(iter(change)) in str(caught.value)
