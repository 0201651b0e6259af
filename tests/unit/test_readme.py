"""What the README and the pages in docs/ name exists: flags, files, and sections; the README stays short.

Run with ``pytest tests/unit/test_readme.py``. Tables that the code prints are in ``test_docs``; commands of
docs/convert.md are run by ``tests/e2e``.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.ranks import REPOSITORY, run_ranks

PAGES = [
    *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted((REPOSITORY / "docs").glob("*.md")),
]
MAX_README_BYTES = 10_240
# Flags of other programs that the pages show.
FOREIGN = {
    "--no-deps",
    "--require-hashes",
    "--only-binary",
    "--nproc-per-node",
    "--nproc_per_node",
    "--nnodes",
    "--batch_size",
    "--build-arg",
    "--include_path",
    "--model",
    "--model_args",
    "--tasks",
    "--capture-range",
    "--capture-range-end",
    "--cpu-bind",
}


def name_of(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def known_flags(rank: int) -> set[str]:
    """Every flag of stock's commands with this plugin, of its own commands, and of the scripts."""
    from fairseq import options, registry
    from fairseq.dataclass.utils import gen_parser_from_dataclass
    from fairseq.models import MODEL_DATACLASS_REGISTRY
    from fairseq.tasks import TASK_DATACLASS_REGISTRY

    import fairseq_moe  # noqa: F401
    from fairseq_moe.models.moe_transformer_lm import MoETransformerLanguageModel

    parsers = [
        options.get_training_parser(),
        options.get_eval_lm_parser(),
        options.get_generation_parser(interactive=True),
        options.get_validation_parser(),
        options.get_preprocessing_parser(),
    ]
    extra = options.get_training_parser()
    MoETransformerLanguageModel.add_args(extra)
    found = {flag for parser in [*parsers, extra] for flag in parser._option_string_actions}
    kinds = [entry["dataclass_registry"] for entry in registry.REGISTRIES.values()]
    for kind in [*kinds, MODEL_DATACLASS_REGISTRY, TASK_DATACLASS_REGISTRY]:
        for config in kind.values():
            try:
                gen_parser_from_dataclass(extra := options.get_parser("any"), config())
            except Exception:  # some of stock's own classes cannot be shown so
                continue
            found |= set(extra._option_string_actions)
    return found


def own_sources() -> str:
    files = [path for folder in ("fairseq_moe", "scripts") for path in (REPOSITORY / folder).rglob("*")]
    return "\n".join(path.read_text() for path in files if path.suffix in {".py", ".sh", ".slurm"})


@pytest.fixture(scope="module")
def flags() -> set[str]:
    return run_ranks(known_flags, 1)[0]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_flag_that_a_page_names_exists(page: Path, flags: set[str]) -> None:
    text = page.read_text()
    if page.name == "from-megatron.md":  # whose tables have Megatron's names first
        text = re.sub(r"^\| `--[^|]*\|", "|", text, flags=re.MULTILINE)
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*[a-z0-9]", text))
    sources = own_sources()
    unknown = {flag for flag in named - flags - FOREIGN if f'"{flag}"' not in sources}
    assert unknown == set()


def links(page: Path) -> Iterator[tuple[str, str]]:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith(("http:", "https:")):
            yield tuple(target.partition("#")[::2])  # type: ignore[misc]


def anchors(page: Path) -> set[str]:
    heads = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    for path, anchor in links(page):
        target = page if not path else page.parent / path
        assert target.exists(), f"{path} is not there"
        assert not anchor or anchor in anchors(target), f"{path}#{anchor} is not there"


def test_the_readme_is_short() -> None:
    assert len((REPOSITORY / "README.md").read_bytes()) <= MAX_README_BYTES


def test_an_unknown_flag_would_be_seen(flags: set[str]) -> None:
    assert {"--num-experts", "--moe-freq", "--lr-scheduler", "--tokens-per-sample", "--adam-betas"} <= flags
    assert "--moe-no-such-flag" not in flags
