"""Planned parameters are those of built models, to the number: every preset, and every rank of layouts of all axes.

Models are built on torch's meta device, on ranks of a process group that is a fake. Run with
``pytest tests/unit/planner/test_parameters.py``.
"""

from collections import Counter
from typing import Any

import pytest
import torch

from fairseq_moe.models.presets import PRESETS
from fairseq_moe.planner.flops import active_parameters
from fairseq_moe.planner.held import Held, held_by
from fairseq_moe.planner.parameters import model_parts, stage_parts
from tests.helpers.axes_layouts import LAYOUTS, MODELS
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.timeout(300)

_TRAINING = (
    "--task",
    "dummy_lm",
    "--criterion",
    "moe_cross_entropy",
    "--tokens-per-sample",
    16,
    "--batch-size",
    2,
)


def _shapes(found: Any) -> Counter[tuple[int, ...]]:
    return Counter(tuple(shape) for shape in found)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_parameters_that_are_built(name: str) -> None:
    from tests.helpers.planned import build_on_meta, parse_flags, shape_from
    from tests.helpers.presets import WordIds

    words = WordIds(PRESETS[name].vocab_size)
    more = ("--mtp-layers", 1) if name == "deepseek_v3" else ()
    args = parse_flags([*_TRAINING, "--arch", name, *more])
    model = build_on_meta(args, words)
    shape = shape_from(args, words)
    parts = model_parts(shape)
    planned = _shapes(entry.shape for part in parts for entry in part.entries)
    assert planned == _shapes(parameter.shape for parameter in model.parameters())
    total = sum(entry.numel for part in parts if not part.name.startswith("mtp") for entry in part.entries)
    assert total == PRESETS[name].num_parameters == model.decoder.size.total
    assert active_parameters(shape, total) == model.decoder.size.active


# Of each, one flag that adds parameters or takes some away.
VARIANTS: dict[str, tuple[Any, ...]] = {
    "plain": (),
    "tied": ("--share-decoder-input-output-embed",),
    "learned positions": ("--decoder-learned-pos",),
    "no final norm": ("--no-decoder-final-norm",),
    "norm of the embedding": ("--layernorm-embedding",),
    "other widths": ("--decoder-input-dim", 6, "--decoder-output-dim", 10),
    "cosine router": ("--use-xmoe",),
    "shared experts": ("--moe-shared-expert-intermediate-size", 7, "--moe-shared-expert-gate"),
    "narrow experts": ("--moe-expert-ffn-dim", 10),
    "dense of another width": ("--alternate-decoder-ffn-embed-dim", 9),
    "frozen": ("--moe-freeze-modules", "routers experts"),
}


def _variants(rank: int, variants: dict[str, tuple[Any, ...]]) -> dict[str, tuple[Any, Any]]:
    """Count planned and built parameters, trained and frozen, of each variant of a GPT of the branch."""
    from tests.helpers.planned import build_on_meta, mapping_from, parse_flags, shape_from
    from tests.helpers.presets import WordIds
    from tests.helpers.tiny import TINY_FLAGS

    found, words = {}, WordIds(44, pad=1)
    tiny = [flag for flag in TINY_FLAGS if flag != "--share-decoder-input-output-embed"]
    for name, flags in variants.items():
        args = parse_flags([*tiny, *flags])
        model = build_on_meta(args, words)
        mapping = mapping_from(args, num_ranks=1)
        held = held_by(stage_parts(shape_from(args, words), mapping, 0), mapping, 0, sharded=True)
        built = Counter({True: 0, False: 0})
        for parameter in model.parameters():
            built[parameter.requires_grad] += parameter.numel()
        found[name] = ((held.trained, held.frozen), (built[True], built[False]))
    return found


def _everything(rank: int, *args: Any) -> tuple[Any, ...]:
    return _variants(rank, args[0]), _by_rank(rank, args[1]), _sharded(rank, args[2])


@pytest.fixture(scope="module")
def counted() -> tuple[Any, ...]:
    """Planned and built numbers, of one process that is every rank in turn."""
    sharded = [_without_zero_1(case) for case in SHARDED]
    (found,) = run_ranks(_everything, 1, VARIANTS, MODELS, sharded, timeout=280)
    return tuple(found)


@pytest.mark.slow
def test_flags_of_stock_s_blocks_are_counted(counted: tuple[Any, ...]) -> None:
    found = counted[0]
    assert found.keys() == VARIANTS.keys()
    assert {name: planned for name, (planned, _) in found.items()} == {
        name: built for name, (_, built) in found.items()
    }
    assert len({planned for planned, _ in found.values()}) == len(VARIANTS)  # each flag changes the count


# Of the other two models, those in which parts differ most.
FOR_ALL = ("T2 X2", "C2 T2 E2 X2", "extended: T2 X4", "P2 V2", "P2 T2", "D2 T2 E2")


def _by_rank(rank: int, models: dict[str, tuple[Any, ...]]) -> dict[str, tuple[list[Any], list[Any]]]:
    """Count planned and built parameters of every rank of every layout that fits a model."""
    from fairseq_moe.distributed.pretended import pretended_rank
    from fairseq_moe.parallel.placement import is_expert
    from tests.helpers.planned import build_on_meta, mapping_from, parse_flags, shape_from
    from tests.helpers.presets import WordIds
    from tests.helpers.tiny import TINY_FLAGS

    found = {}
    words = WordIds(43, pad=1)  # which tensor ranks cannot share evenly
    for model_name, model_flags in models.items():
        for name, layout in LAYOUTS.items():
            if model_name != "stock-like" and name not in FOR_ALL:
                continue
            args = parse_flags([*TINY_FLAGS, "--decoder-ffn-embed-dim", 16, *model_flags, *layout.flags])
            shape, mapping = shape_from(args, words), mapping_from(args, num_ranks=layout.ranks)
            planned, built = [], []
            for number in range(layout.ranks):
                with pretended_rank(number, layout.ranks):
                    model = build_on_meta(args, words)
                    experts = sum(p.numel() for p in model.parameters() if is_expert(p))
                    dense = sum(p.numel() for p in model.parameters()) - experts
                built.append(Held(dense=dense, expert=experts))
                parts = stage_parts(shape, mapping, mapping.grid.coordinate(number, "pipe"))
                planned.append(held_by(parts, mapping, number, sharded=False))
            found[f"{model_name}, {name}"] = (planned, built)
    return found


_MTP = (*MODELS["latent"], "--mtp-layers", 1, "--mtp-loss-weight", 0.3)


@pytest.mark.slow
def test_every_rank_of_every_layout_holds_what_is_planned(counted: tuple[Any, ...]) -> None:
    found = counted[1]
    wrong = {name: (planned, built) for name, (planned, built) in found.items() if planned != built}
    assert wrong == {} and len(found) == len(LAYOUTS) + 2 * len(FOR_ALL)


def _sharded(rank: int, cases: list[tuple[Any, ...]]) -> list[tuple[list[int], list[int]]]:
    """Count planned and real shards of every rank, of models that torch's fully_shard has cut."""
    from torch.distributed.tensor import DTensor

    from fairseq_moe.distributed.pretended import pretended_rank
    from fairseq_moe.flags.sharding import Sharding
    from fairseq_moe.stock.sharding.sharded_model import _shard_modules
    from tests.helpers.planned import mapping_from, parse_flags, shape_from
    from tests.helpers.presets import WordIds, build_model
    from tests.helpers.tiny import TINY_FLAGS

    found, words = [], WordIds(43, pad=1)
    for num_ranks, *flags in cases:
        args = parse_flags([*TINY_FLAGS, "--decoder-ffn-embed-dim", 16, *flags, "--use-torch-fsdp2"])
        shape, mapping = shape_from(args, words), mapping_from(args, num_ranks=num_ranks)
        planned, built = [], []
        for number in range(num_ranks):
            with pretended_rank(number, num_ranks):
                model = build_model(args, words)
                mesh = model.decoder.mesh
                group = mesh.dense_shards or torch.distributed.group.WORLD
                _shard_modules(model, model.decoder, group, Sharding.ALL)
                own = (p.to_local() if isinstance(p, DTensor) else p for p in model.parameters())
                built.append(sum(part.numel() for part in own))
            parts = stage_parts(shape, mapping, mapping.grid.coordinate(number, "pipe"))
            planned.append(held_by(parts, mapping, number, sharded=True).total)
        found.append((planned, built))
    return found


SHARDED_LAYOUTS = ("2 ranks", "D2 C2 E2, ZeRO-3", "D2 T2 E2, ZeRO-1", "D2 T2 X2")
SHARDED = [
    *(
        (LAYOUTS[name].ranks, *MODELS[model], *LAYOUTS[name].flags)
        for name in SHARDED_LAYOUTS
        for model in MODELS
    ),
    (8, *MODELS["grouped"], "--expert-model-parallel-size", 2),
    (6, *MODELS["stock-like"], "--expert-model-parallel-size", 2),  # parts are uneven
    (8, *_MTP, "--pipeline-model-parallel-size", 2, "--expert-model-parallel-size", 2),
]


@pytest.mark.slow
def test_every_rank_holds_the_shards_that_are_planned(counted: tuple[Any, ...]) -> None:
    found = counted[2]
    assert len(found) == len(SHARDED)
    for case, (planned, built) in zip(SHARDED, found, strict=True):
        assert planned == built, case
    assert any(len(set(planned)) > 1 for planned, _ in found)


def _without_zero_1(case: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(flag for flag in case if flag not in ("--use-distributed-optimizer", "--use-torch-fsdp2"))
