"""Write the page: HTML and CSS that need nothing else, readable on a phone, light or dark as the reader's system is."""

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fairseq_moe.report.facts import Card
from fairseq_moe.report.sections import Section, Table

__all__ = ["Page", "render"]

_STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --ink: #1f2937; --soft: #6b7280; --line: #e5e7eb; --box: #f8fafc; }
@media (prefers-color-scheme: dark) {
  :root { --page: #11151c; --ink: #e5e7eb; --soft: #9ca3af; --line: #2b3340; --box: #181e28; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.2; margin: 0.5rem 0; }
h2 { font-size: 1.1rem; margin: 0 0 0.5rem; }
.soft, figcaption, dd small { color: var(--soft); font-size: 0.875rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: 0.75rem; margin: 1rem 0; }
.cards div, section, .notes { background: var(--box); border: 1px solid var(--line); border-radius: 0.5rem;
  padding: 0.75rem; }
.cards dt { color: var(--soft); font-size: 0.875rem; }
.cards dd { margin: 0; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.cards dd small { display: block; }
main { columns: 26rem 2; column-gap: 1rem; margin-top: 1rem; }
section { break-inside: avoid; margin-bottom: 1rem; }
figure { margin: 0; }
svg { display: block; width: 100%; height: auto; }
svg text { font-family: system-ui, sans-serif !important; }
.scroll { overflow-x: auto; max-height: 24rem; margin-top: 0.5rem; }
table { border-collapse: collapse; font-size: 0.875rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 0.25rem 0.75rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
pre { overflow-x: auto; font-size: 0.8rem; }
p { margin: 0.25rem 0; }
"""


@dataclass(frozen=True, kw_only=True)
class Page:
    """Hold what the page says.

    Args:
        name: of the run.
        written: when, in words.
        cards: numbers at the top.
        sections: the parts.
        problems: sentences about files that could not be read in full.
        traces: names of files that a profiler has written.
        texts: further files, by name.
        refresh_sec: a browser reads the page anew after so many seconds; None: it does not.
    """

    name: str
    written: str
    cards: Sequence[Card]
    sections: Sequence[Section]
    problems: Sequence[str]
    traces: Sequence[str]
    texts: Sequence[tuple[str, str]]
    refresh_sec: int | None = None


def render(page: Page) -> str:
    """Write the page as HTML; all text of the run is escaped."""
    return "\n".join(_lines(page)) + "\n"


def _lines(page: Page) -> Iterator[str]:
    title = _escaped(page.name)
    yield '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    if page.refresh_sec is not None:
        yield f'<meta http-equiv="refresh" content="{page.refresh_sec}">'
    yield f"<title>{title}: training report</title>\n<style>{_STYLE}</style>\n</head>\n<body>"
    yield f'<header>\n<h1>{title}</h1>\n<p class="soft">Training report, {_escaped(page.written)}</p>\n</header>'
    yield '<dl class="cards" aria-label="Summary">'
    for card in page.cards:
        note = f"<small>{_escaped(card.note)}</small>" if card.note else ""
        yield f"<div><dt>{_escaped(card.label)}</dt><dd>{_escaped(card.value)}{note}</dd></div>"
    yield "</dl>"
    yield from _notes(page)
    yield "<main>"
    for section in page.sections:
        yield from _section(section)
    yield "</main>"
    for name, text in page.texts:
        yield f"<details>\n<summary>{_escaped(name)}</summary>\n<pre>{_escaped(text)}</pre>\n</details>"
    yield "</body>\n</html>"


def _notes(page: Page) -> Iterator[str]:
    missing = [section.title for section in page.sections if section.is_missing]
    sentences = list(page.problems)
    if missing:
        sentences.append(f"Not here, for the reasons given below: {', '.join(missing)}.")
    if page.traces:
        sentences.append(f"Profiles: {', '.join(page.traces)}.")
    if sentences:
        yield '<div class="notes">'
        yield from (f"<p>{_escaped(sentence)}</p>" for sentence in sentences)
        yield "</div>"


def _section(section: Section) -> Iterator[str]:
    anchor = "".join(letter if letter.isalnum() else "-" for letter in section.title.lower())
    yield f'<section id="{anchor}" aria-labelledby="{anchor}-title">'
    yield f'<h2 id="{anchor}-title">{_escaped(section.title)}</h2>'
    told = "".join(f"<p>{_escaped(sentence)}</p>" for sentence in section.sentences)
    if section.svg is not None:
        yield f"<figure>\n{section.svg}\n<figcaption>{told}</figcaption>\n</figure>"
    else:
        yield told
    if section.table is not None:
        yield from _table(section.table)
    yield "</section>"


def _table(table: Table) -> Iterator[str]:
    yield '<div class="scroll" tabindex="0">\n<table>\n<thead><tr>'
    yield "".join(f'<th scope="col">{_escaped(cell)}</th>' for cell in table.head)
    yield "</tr></thead>\n<tbody>"
    for row in table.rows:
        yield "<tr>" + "".join(f"<td>{_escaped(cell)}</td>" for cell in row) + "</tr>"
    yield "</tbody>\n</table>\n</div>"


def _escaped(text: str) -> str:
    return html.escape(text, quote=True)
