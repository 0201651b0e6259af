"""Every module of the package imports, by itself and twice."""

import importlib
import pkgutil
import subprocess
import sys

import pytest

import fairseq_moe


def module_names() -> list[str]:
    found = pkgutil.walk_packages(fairseq_moe.__path__[:1], prefix="fairseq_moe.")
    return sorted(module.name for module in found if not module.name.endswith("__main__"))


@pytest.mark.parametrize("name", module_names())
def test_imports(name: str) -> None:
    assert importlib.import_module(name).__doc__, f"{name} has no docstring"


def test_importing_again_changes_nothing() -> None:
    from fairseq.models import ARCH_MODEL_REGISTRY, MODEL_REGISTRY
    from fairseq.trainer import Trainer

    before = dict(MODEL_REGISTRY), dict(ARCH_MODEL_REGISTRY), Trainer.__dict__["train_step"]
    importlib.reload(fairseq_moe)
    after = dict(MODEL_REGISTRY), dict(ARCH_MODEL_REGISTRY), Trainer.__dict__["train_step"]
    assert before == after


def test_a_training_start_leaves_the_converter_alone() -> None:
    program = (
        "import sys, fairseq_moe; print(*(name for name in sys.modules if name.startswith('fairseq_moe')))"
    )
    started = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=100
    )
    loaded = started.stdout.split()
    assert "fairseq_moe.models.moe_transformer_lm" in loaded
    assert [name for name in loaded if name.startswith("fairseq_moe.convert")] == []


def test_all_transformer_lm_names_have_experts_to_offer() -> None:
    from fairseq.models import ARCH_MODEL_INV_REGISTRY, ARCH_MODEL_REGISTRY

    names = ARCH_MODEL_INV_REGISTRY["transformer_lm"]
    assert "transformer_lm_gpt" in names
    assert {ARCH_MODEL_REGISTRY[name].__name__ for name in names} == {"MoETransformerLanguageModel"}
