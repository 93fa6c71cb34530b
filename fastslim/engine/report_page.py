"""The building blocks of a page: sections, cards, tables, figures, and the page itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fastslim.engine.report_chart import Chart
from fastslim.engine.report_markup import Markup, element, join
from fastslim.engine.report_style import SCRIPT, style
from fastslim.engine.report_svg import draw, legend

WIDE, NARROW = (520, 330), (334, 290)  # px: a column of two on a desk, a phone


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: what is shown.
        value: what it is sorted by; None sorts by the text.
        words: set to the left.
        wrap: may run over several lines.
    """

    text: str
    value: float | None = None
    words: bool = False
    wrap: bool = False

    def markup(self) -> Markup:
        """The cell in a row."""
        classes = " ".join(name for name, on in (("words", self.words), ("wrap", self.wrap)) if on)
        value = None if self.value is None or math.isnan(self.value) else repr(self.value)
        return element("td", self.text, class_=classes or None, data_value=value)


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        name: of its place in the page.
        title: its heading.
        parts: what it holds.
    """

    name: str
    title: str
    parts: tuple[Markup, ...]

    def markup(self) -> Markup:
        """The section with its heading."""
        return element("section", element("h2", self.title), *self.parts, id=self.name)


def card(name: str, big: str, small: str) -> Markup:
    """One headline number."""
    return element(
        "div",
        element("dt", name),
        element("dd", element("div", big, class_="big"), element("div", small, class_="small")),
        class_="card",
    )


def figure(chart: Chart) -> Markup:
    """A chart with its title and legend, in one form for desks and one for phones."""
    wide, narrow = draw(chart, *WIDE), draw(chart, *NARROW)
    return element(
        "figure",
        caption(chart.title, chart.detail),
        legend(chart),
        Markup(wide.replace("<svg ", '<svg class="wide" ', 1)),
        Markup(narrow.replace("<svg ", '<svg class="narrow" ', 1)),
    )


def caption(title: str, detail: str) -> Markup:
    """What a picture shows."""
    return element("figcaption", element("strong", title), element("span", detail) if detail else None)


def pair(*figures: Markup, alike: bool = True) -> Markup:
    """Pictures side by side where there is room; those that are alike become equally high."""
    return element("div", *figures, class_="pair" if alike else "pair start")


def table(title: str, detail: str, head: Sequence[Cell], rows: Sequence[Sequence[Cell]]) -> Markup:
    """A table whose columns can be sorted."""
    heads = [element("th", cell.text, scope="col", class_="words" if cell.words else None) for cell in head]
    body = [element("tr", *(cell.markup() for cell in row)) for row in rows]
    listed = element(
        "table",
        element("thead", element("tr", *heads)),
        element("tbody", *body),
        class_="sortable",
        aria_label=title,
    )
    scrolled = element("div", listed, class_="scroll", tabindex=0, role="region", aria_label=title)
    return element("figure", caption(title, detail), scrolled, class_="table")


def missing(what: str, command: str) -> Markup:
    """One line about a part that is not there, and how to make it."""
    return element("p", f"{what} ", element("code", command), class_="missing")


def page(title: str, lead: str, cards: Sequence[Markup], sections: Sequence[Section], foot: Markup) -> str:
    """The whole page."""
    links = [element("a", section.title, href=f"#{section.name}") for section in sections]
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        element("style", Markup(style())),
    )
    body = element(
        "body",
        element(
            "header",
            element("h1", title),
            element("p", lead, class_="muted"),
            element("nav", *links, aria_label="Sections"),
        ),
        element(
            "main", element("dl", *cards, class_="cards") if cards else None, *(part.markup() for part in sections)
        ),
        element("footer", foot),
        element("script", Markup(SCRIPT)),
    )
    return f"<!doctype html>\n{join(element('html', head, body, lang='en'))}\n"
