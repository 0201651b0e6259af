"""No flag of ours changes unseen: every one, as the command line and as hydra know it, is in tests/golden/flags.txt.

After a wanted change: ``python -m tests.unit.flags.test_flag_list`` writes the file anew.
"""

import argparse
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from tests.helpers.ranks import REPOSITORY, run_ranks

GOLDEN = REPOSITORY / "tests" / "golden" / "flags.txt"


def flag_list(rank: int = 0) -> str:
    """One paragraph per flag, sorted; imports fairseq, so tests run it in a fork."""
    return "\n".join(sorted(_paragraphs())) + "\n"


def _paragraphs() -> Iterator[str]:
    from fairseq.criterions.cross_entropy import CrossEntropyCriterionConfig
    from fairseq.dataclass.utils import gen_parser_from_dataclass
    from fairseq.models import ARCH_MODEL_REGISTRY
    from fairseq.models.transformer_lm import TransformerLanguageModelConfig

    import fairseq_moe  # noqa: F401
    from fairseq_moe.criterions.moe_cross_entropy import MoECrossEntropyCriterionConfig
    from fairseq_moe.models.moe_transformer_lm import MoETransformerLanguageModelConfig

    parser = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    ARCH_MODEL_REGISTRY["transformer_lm"].add_args(parser)
    gen_parser_from_dataclass(parser, MoECrossEntropyCriterionConfig())
    actions = {action.dest: action for action in parser._actions}
    for ours, stock in (
        (MoETransformerLanguageModelConfig, TransformerLanguageModelConfig),
        (MoECrossEntropyCriterionConfig, CrossEntropyCriterionConfig),
    ):
        of_stock = {field.name: field.type for field in fields(stock)}
        for field in fields(ours):
            if field.name not in of_stock:
                yield _paragraph(field, actions.get(field.name))
            else:
                assert field.type == of_stock[field.name]


def _paragraph(field: Any, action: argparse.Action | None) -> str:
    kind = field.type.__name__ if isinstance(field.type, type) else str(field.type)
    lines = [f"{field.name}: {kind} = {field.default!r}", f"    {field.metadata.get('help')}"]
    if action is not None:
        takes = getattr(action.type, "__qualname__", action.type).split(".")[-1] if action.type else None
        lines.append(
            f"    {', '.join(action.option_strings)}: {type(action).__name__} type={takes} nargs={action.nargs} "
            f"const={action.const!r} choices={action.choices} default={action.default!r}"
        )
        assert action.help == field.metadata["help"]
    return "\n".join(lines)


def test_every_flag_is_as_recorded() -> None:
    [found] = run_ranks(flag_list, 1)
    assert found == GOLDEN.read_text(), "a flag has changed; see the head of this file"


if __name__ == "__main__":
    GOLDEN.write_text(flag_list())
