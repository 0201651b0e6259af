"""Null, zero, false or absent settings of a config.json: refused, or the same model as transformers'.

Run with ``pytest tests/numerics/test_config_readings.py``. A tiny model of every family; each key that conversion
reads is changed in turn. Where we still read the model that the unchanged file describes, transformers must compute
with the changed file what it computes with the unchanged one; where we read another one, its tensors must be those
that transformers gives it.
"""

from collections import Counter
from typing import Any

import pytest
import torch
import transformers

from fairseq_moe.convert.hf.families import read_config
from fairseq_moe.convert.hf.names import tensor_table
from fairseq_moe.errors import ConfigError
from tests.helpers.families import FAMILIES, VOCABULARY

ABSENT: Any = object()
CHANGES: dict[str, Any] = {"null": None, "zero": 0, "false": False, "absent": ABSENT}
NOT_OF_THE_MODEL = {
    "architectures", "model_type", "transformers_version", "dtype", "torch_dtype", "use_cache", "quantization_config",
    "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "id2label", "label2id",
}  # fmt: skip


def published(name: str) -> dict[str, Any]:
    """The complete config.json that transformers writes for the tiny model of a family, with version 4's theta."""
    family = FAMILIES[name]
    config = getattr(transformers, f"{family.kind}Config")(**family.config)
    values: dict[str, Any] = config.to_dict()
    rope = dict(values.pop("rope_parameters"))
    values["rope_theta"] = rope["rope_theta"]
    values["rope_scaling"] = rope if rope.get("rope_type") == "yarn" else None
    for key in ("v_head_dim", "norm_topk_prob"):
        if values.get(key) is None:
            values.pop(key, None)
    return values


def their_model(values: dict[str, Any]) -> Any:
    """transformers' model with weights that depend on their names alone, or None where it cannot be built or run."""
    try:
        kind = transformers.models.auto.configuration_auto.CONFIG_MAPPING[values["model_type"]]
        model = transformers.AutoModelForCausalLM.from_config(
            kind.from_dict(dict(values)), attn_implementation="eager", experts_implementation="eager"
        )
    except Exception:
        return None
    with torch.no_grad():
        for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()]):
            if tensor.is_floating_point() and "inv_freq" not in name:
                generator = torch.Generator().manual_seed(sum(name.encode()))
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
    return model.float().eval()


def their_logits(model: Any) -> torch.Tensor | None:
    ids = torch.randint(VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad():
            logits: torch.Tensor = model(ids, use_cache=False).logits
            return logits
    except Exception:
        return None


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_changed_setting_is_refused_or_read_as_transformers_reads_it(name: str) -> None:
    values = published(name)
    spec = read_config(values)
    reference = their_logits(their_model(values))
    assert reference is not None
    outcomes: Counter[str] = Counter()
    wrong = []
    for key in sorted(set(values) - NOT_OF_THE_MODEL):
        for label, value in CHANGES.items():
            changed = {k: v for k, v in values.items() if k != key} | (
                {} if value is ABSENT else {key: value}
            )
            try:
                found = read_config(changed)
            except ConfigError:
                outcomes["refused"] += 1
                continue
            theirs = their_model(changed)
            logits = None if theirs is None else their_logits(theirs)
            if theirs is None or logits is None:
                outcomes["transformers fails"] += 1
                continue
            tensors = {block.name for tensor in tensor_table(found, fused=False) for block in tensor.blocks}
            if found == spec:
                outcomes["same"] += 1
                if logits.shape != reference.shape or not torch.equal(logits, reference):
                    wrong.append(f"{key} {label}")
            else:
                outcomes["another"] += 1
                theirs_named = set(theirs.state_dict())
                if (
                    not any("experts.gate_up_proj" in entry for entry in theirs_named)
                    and tensors != theirs_named
                ):
                    wrong.append(f"{key} {label}: other tensors")
    assert wrong == []
    assert outcomes["refused"] > 20
    assert outcomes["same"] > 5


def test_the_test_sees_a_wrong_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it was: rope_interleave null read as true, which is what an absent key means."""
    values = published("deepseek_v3")
    changed = values | {"rope_interleave": None}
    with pytest.raises(ConfigError, match="rope_interleave null"):
        read_config(changed)
    same, other = (their_logits(their_model(v)) for v in (values, changed))
    assert same is not None and other is not None
    assert not torch.equal(same, other)
