"""The page's structure by an HTML parser: sections, figures with words, nothing to load, no text becomes markup."""

import json
import re
from pathlib import Path

import pytest

from fairseq_moe.report import write_report
from tests.helpers.reports import ParsedPage, inner, load_line, parsed, write_run

SECTIONS = [
    *("loss", "gate-losses", "words-per-second", "model-flop-utilisation--mfu-", "dropped-choices"),
    *(
        "load-of-the-experts",
        "dead-experts",
        "gradient-norm",
        "memory",
        "skipped-updates",
        "plan-and-measured",
    ),
]
_REFERS = ("src", "href", "xlink:href", "srcset", "data", "action", "poster", "background")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> ParsedPage:
    return parsed(write_report(write_run(tmp_path_factory.mktemp("run"))))


def told(page: ParsedPage, section: str) -> str:
    return " ".join(page.text[section].split())


def test_every_section_is_there_with_a_heading_that_names_it(page: ParsedPage) -> None:
    assert [section["id"] for section in page.all("section")] == SECTIONS
    headings = [heading["id"] for heading in page.all("h2")]
    assert [section["aria-labelledby"] for section in page.all("section")] == headings
    assert len(page.all("h1")) == 1


def test_figures_are_inline_and_have_words(page: ParsedPage) -> None:
    figures = page.all("svg")
    drawn = [around for tag, _, around in page.elements if tag == "svg"]
    assert len(figures) == 8  # all but memory, skipped updates and the plan's table
    assert all("figure" in around and "section" in around for around in drawn)
    assert all(figure["role"] == "img" and len(figure["aria-label"]) > 40 for figure in figures)
    assert not page.all("img") and not page.all("script")
    for axis in ("updates", "bits per word", "words / s, all ranks", "% of choices", "load / mean load"):
        assert any(axis in text for text in page.text.values()), axis


def test_nothing_is_loaded_from_elsewhere(page: ParsedPage) -> None:
    references = [
        value for _, attributes, _ in page.elements for name, value in attributes.items() if name in _REFERS
    ]
    assert references and all(value.startswith(("#", "data:image/png;base64,")) for value in references)
    everything = " ".join(page.text.values()) + json.dumps([attributes for _, attributes, _ in page.elements])
    assert (
        re.findall(
            r"url\((?!#)|@import|https?:|//", re.sub(r"data:image/png;base64,[\w+/=]*", "", everything)
        )
        == []
    )


def test_ids_are_unique_and_references_find_theirs(page: ParsedPage) -> None:
    ids = [attributes["id"] for _, attributes, _ in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    everything = json.dumps([attributes for _, attributes, _ in page.elements])
    used = set(re.findall(r'url\(#([^)]+)\)|href": "#([^"]+)', everything))
    assert used and {first or second for first, second in used} <= set(ids)


def test_page_is_made_for_phones_and_for_the_dark(page: ParsedPage) -> None:
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")
    assert "@media (prefers-color-scheme: dark)" in page.text[""]
    tables = [around for tag, _, around in page.elements if tag == "table"]
    assert tables and all(around[-1] == "div" for around in tables)
    assert len([box for box in page.all("div") if box.get("class") == "scroll"]) == len(tables)


def test_numbers_at_the_top_and_in_words(page: ParsedPage) -> None:
    """1000 words/s of 1600 FLOP are 1.6 MFLOP/s, of two devices with 4 each: 20 %."""
    top = " ".join(page.text[""].split())
    for words in ("state ended", "updates 6", "8.300 last", "valid loss, bits 8.400"):
        assert words.replace(" ", "") in top.replace(" ", ""), words
    assert "Median: 20 %" in told(page, "model-flop-utilisation--mfu-")
    assert "layer 1: dead expert 1" in told(page, "load-of-the-experts")
    assert "1 at update 6" in told(page, "dead-experts") and "6 experts" in told(page, "dead-experts")
    assert told(page, "skipped-updates").endswith("None.")
    assert "words per second900 to 1,1001,000as planned" in told(page, "plan-and-measured")


def test_text_of_a_run_is_never_markup(tmp_path: Path) -> None:
    evil = '<script>alert("$x$")</script>'
    folder = tmp_path / "<b>run"
    folder.mkdir()
    lines = [
        inner(2, **{f"moe_{evil}loss": 1}),
        json.dumps({f"{evil}_loss": "1", f"{evil}_num_updates": "2"}),
    ]
    write_run(folder, **{
        "train.jsonl": "\n".join(lines), "measured.json": json.dumps({evil: evil}), "command.sh": evil,
        "plan.json": json.dumps({"device": evil}),
    })  # fmt: skip
    page = parsed(write_report(folder))
    assert not page.all("script") and not page.all("b")
    assert "<b>run" in page.text[""] and evil in page.text[""] and evil in page.text["loss"]
    assert evil in page.text["plan-and-measured"]


def test_missing_parts_are_named_with_a_reason(tmp_path: Path) -> None:
    (tmp_path / "some.log").write_text(json.dumps({"loss": "4", "num_updates": "2"}))
    page = parsed(write_report(tmp_path))
    titles = (
        "Gate losses, Words per second, Model FLOP utilisation (MFU), Dropped choices, Load of the experts"
    )
    assert (
        f"{titles}, Dead experts, Gradient norm, Memory, Skipped updates, Plan and measured." in page.text[""]
    )
    assert [section["id"] for section in page.all("section")] == SECTIONS
    assert len(page.all("svg")) == 1
    for section, words in (
        ("model-flop-utilisation--mfu-", "a plan.json beside the logs"),
        ("load-of-the-experts", "No moe_load.jsonl was found"),
        ("skipped-updates", "the output of the ranks"),
        ("memory", "done on GPUs"),
        ("plan-and-measured", "neither a plan.json nor a measured.json"),
    ):
        assert words in page.text[section]


def test_damaged_files_are_named_and_the_rest_is_shown(tmp_path: Path) -> None:
    write_run(tmp_path, **{
        "train.jsonl": f'{inner(2)}\n{{"epoch": 1, "upd\n{inner(4)}\n{{"ep',
        "checkpoints/moe_load.jsonl": f'{load_line(2, [[1, 2]])}\n{{"version": 1}}\n{load_line(4, [[2, 2]])[:40]}',
        "plan.json": '{"device": ', "measured.json": "[1]",
    })  # fmt: skip
    page = parsed(write_report(tmp_path))
    for words in (
        "train.jsonl: 2 lines cannot be read and are left out.",
        "moe_load.jsonl: 2 lines cannot be read and are left out.",
        "plan.json holds no JSON object",
        "measured.json holds no JSON object",
    ):
        assert words in page.text[""]
    assert "8.6 at update 4" in told(page, "loss")
    assert "At update 2 the busiest expert, in layer 1, has 1.33" in told(page, "load-of-the-experts")


def test_many_layers_are_chosen_from_and_all_in_the_table(tmp_path: Path) -> None:
    loads = load_line(3, [[1, layer + 1] for layer in range(20)]) + "\n"
    write_run(tmp_path, **{"checkpoints/moe_load.jsonl": loads})
    page = parsed(write_report(tmp_path))
    text = page.text["load-of-the-experts"]
    drawn = re.findall(r"layer (\d+)\n", text)
    assert drawn[0] == "1" and drawn[-1] == "39" and len(drawn) == 8
    assert "Drawn are 8 of 20 layers" in text
    tables = [around for tag, _, around in page.elements if tag == "tr" and "tbody" in around]
    assert len(tables) == 20 + 5  # five of the plan
