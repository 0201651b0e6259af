"""Make the files of a run that a report reads, and parse the page."""

import json
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

__all__ = ["ParsedPage", "inner", "load_line", "parsed", "write_run"]

_VOID = {"meta", "br", "link", "img", "input", "hr"}


def inner(update: int, **values: Any) -> str:
    """Write a line as fairseq does at each --log-interval: all numbers but two are texts."""
    numbers = {
        "loss": 9 - update / 10,
        "inner_loss": 8.9 - update / 10,
        "moe_gate_loss": 1.5,
        "wps": 1000,
        "ups": 2,
    }
    numbers |= {
        "wpb": 500,
        "drop_rate": 12.5,
        "gnorm": 1.25,
        "wall": 60 * update,
        "num_updates": update,
        **values,
    }
    return json.dumps(
        {"epoch": 1, "update": update / 100, **{name: str(value) for name, value in numbers.items()}}
    )


def load_line(update: int, counts: list[list[int]], *, split: str = "train") -> str:
    """Write a line of moe_load.jsonl, for layers 1, 3, ...; all choices are kept."""
    layers = [2 * index + 1 for index in range(len(counts))]
    return json.dumps(
        {"version": 1, "split": split, "update": update, "layers": layers, "wanted": counts, "kept": counts}
    )


def write_run(folder: Path, **files: str) -> Path:
    """Write a run directory as the launcher lays it out; ``files`` replaces some of logs, loads, plan and measured."""
    valid = json.dumps({"epoch": 1, "valid_loss": "8.4", "valid_num_updates": "6"})
    output = "2026-01-01 | INFO | "
    text = {
        "train.jsonl": "\n".join([*(inner(update) for update in (2, 4, 6)), valid]),
        "logs/rank-0.log": f"{output}train_inner | {inner(6)}\n{output}fairseq_cli.train | done training in 3 s\n",
        "checkpoints/moe_load.jsonl": "".join(load_line(u, [[5, 0, 3], [2, 2, 4]]) + "\n" for u in (2, 4, 6)),
        "plan.json": json.dumps({
            "device": {"peak_flops": 4_000_000}, "num_ranks": 2, "flops_per_token": 1600, "words_per_sec": [900, 1100],
            "step_sec": [0.25, 0.4], "update_tokens": 500, "peak_bytes": 2 << 30,
        }),
        "measured.json": json.dumps({"updates": 6, "peak_bytes": {"planned": 100, "measured": 150}}),
        **files,
    }  # fmt: skip
    for name, content in text.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder


@dataclass
class ParsedPage(HTMLParser):
    """Hold the elements of a page: (name, attributes) each, the open ones around it, and all text by section."""

    elements: list[tuple[str, dict[str, str], tuple[str, ...]]] = field(default_factory=list)
    text: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()
        self._open: list[str] = []
        self._section = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note an element and, of sections, where it begins."""
        attributes = {name: value or "" for name, value in attrs}
        self.elements.append((tag, attributes, tuple(self._open)))
        if tag == "section":
            self._section = attributes["id"]
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note an element that has no content."""
        self.elements.append((tag, {name: value or "" for name, value in attrs}, tuple(self._open)))

    def handle_endtag(self, tag: str) -> None:
        """Close an element, which must be the last that was opened."""
        assert self._open and self._open.pop() == tag, f"</{tag}> closes nothing"
        if tag == "section":
            self._section = ""

    def handle_data(self, data: str) -> None:
        """Add text to that of its section."""
        self.text[self._section] = self.text.get(self._section, "") + data

    def close(self) -> None:
        """Check that all is closed."""
        super().close()
        assert self._open == []

    def all(self, tag: str) -> list[dict[str, str]]:
        """List the attributes of all elements of that name."""
        return [attributes for name, attributes, _ in self.elements if name == tag]


def parsed(path: Path) -> ParsedPage:
    """Parse a page, whose elements must all be closed in order."""
    page = ParsedPage()
    page.feed(path.read_text(encoding="utf-8"))
    page.close()
    return page
