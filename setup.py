"""Packaging of fairseq_moe; imports nothing but setuptools, so it builds on a machine without torch.

fairseq itself is not among the hard requirements: several distributions provide ``import fairseq`` with the
API of 0.12.3 (ve-fairseq, fairseq-fixed, a source checkout), and naming one would install it over another.
The extra ``fairseq`` names the one that this project is tested with; requirements/fairseq.txt pins its hash.
"""

import re
from pathlib import Path

from setuptools import find_namespace_packages, find_packages, setup

ROOT = Path(__file__).parent

INSPECT = ["matplotlib>=3.8", "rich>=13"]
DEMO = [*INSPECT, "sentencepiece>=0.2"]
HF = ["tokenizers>=0.20", "transformers>=5"]
# Its model classes change from release to release.
EVAL = ["lm_eval==0.4.13", "tokenizers>=0.20"]
# The reference that converted models are compared with: another release may compute something else.
TEST = [
    *DEMO,
    *EVAL,
    "accelerate>=1.15",  # the harness's own model for transformers imports it
    "tensorboard>=2.16",
    "pytest>=8",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    "tokenizers>=0.20",
    "transformers==5.23.0",
    "triton>=3.6; sys_platform == 'linux'",  # its interpreter runs the GPU's kernels on CPU
]
DEV = [*TEST, "mypy>=1.15", "ruff>=0.9"]


def version() -> str:
    """The version written in the package, read without importing it."""
    text = (ROOT / "fairseq_moe" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', text, flags=re.MULTILINE)
    assert found is not None, "fairseq_moe/__init__.py has no __version__"
    return found.group(1)


def long_description() -> str:
    """The README, where there is one (a source archive may leave it out)."""
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.is_file() else ""


setup(
    name="fairseq_moe",
    version=version(),
    description="Mixture-of-experts language models for stock fairseq",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    packages=[
        *find_packages(include=["fairseq_moe", "fairseq_moe.*"]),
        # A namespace package that hydra searches for plugins: it must not have an __init__.py.
        *find_namespace_packages(include=["hydra_plugins", "hydra_plugins.*"]),
    ],
    package_data={"fairseq_moe": ["**/*.yaml"]},
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.13",
        "fairscale==0.4.13",  # the adapter's changes for CPU are written for this release
        "hydra-core>=1.3.2,<1.4",  # 1.4 drops the mode that fairseq-hydra-train starts in
        "omegaconf>=2.3",
        "numpy>=1.26",
        "safetensors>=0.4",
    ],
    extras_require={
        "fairseq": ["ve-fairseq==0.12.3"],
        "hf": HF,
        "inspect": INSPECT,
        "demo": DEMO,
        "eval": EVAL,
        "tensorboard": ["tensorboard>=2.16"],
        "test": TEST,
        "dev": DEV,
    },
    entry_points={
        "console_scripts": [
            "fairseq-moe-checkpoint = fairseq_moe.checkpoint_tools.command:main",
            "fairseq-moe-convert = fairseq_moe.convert.cli:main",
            "fairseq-moe-inspect = fairseq_moe.inspect:main",
            "fairseq-moe-launch = fairseq_moe.launch.command_line:main",
            "fairseq-moe-report = fairseq_moe.report.command:main",
            "fairseq-moe-plan = fairseq_moe.planner.command_line:main",
        ]
    },
)
