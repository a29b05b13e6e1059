"""Reading a page more strictly than a browser does: whole, self-contained and accessible."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser
from itertools import pairwise

VOID = {"meta", "br", "img", "link", "hr", "input"}

DRAWING = {"svg", "path", "rect", "circle", "text"}

ALLOWED = {
    *("html", "head", "meta", "title", "style", "body", "header", "main", "footer", "nav"),
    *("section", "h1", "h2", "h3", "h4", "p", "a", "b", "i", "br", "span", "code", "pre", "div"),
    *("ul", "li", "dl", "dt", "dd", "table", "thead", "tbody", "tfoot", "tr", "th", "td"),
    *("details", "summary", "figure", "figcaption", *DRAWING),
}
"""Every element that a page of ours is made of; nothing among them loads or runs anything."""


@dataclass
class Page:
    """What is on a page."""

    elements: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    headings: list[tuple[int, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """Everything that is shown as text, in one line."""
        return " ".join(" ".join(self.words).split())

    def attributes(self, name: str) -> list[str]:
        """The values of an attribute, wherever it is."""
        return [values[name] for _, values in self.elements if name in values]

    def count(self, element: str) -> int:
        """How often an element is there."""
        return sum(name == element for name, _ in self.elements)


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.page, self.open = Page(), []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.page.elements.append((tag, {name: value or "" for name, value in attrs}))
        if len({name for name, _ in attrs}) < len(attrs):
            self.page.problems.append(f"an attribute of <{tag}> is there twice")
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("h1", "h2", "h3", "h4"):
            self.page.headings.append((int(tag[1]), ""))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.page.problems.append(f"</{tag}> at {self.getpos()} closes nothing that is open")

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.page.words.append(data)
            if any(tag in ("h1", "h2", "h3", "h4") for tag in self.open):
                level, text = self.page.headings[-1]
                self.page.headings[-1] = level, text + data

    def handle_comment(self, data: str) -> None:
        self.page.problems.append(f"a comment: {data[:40]}")


def read_page(text: str) -> Page:
    """The page of a text; what is wrong with it is among its ``problems``."""
    reader = _Reader()
    reader.feed(text)
    reader.close()
    page = reader.page
    if reader.open:
        page.problems.append(f"never closed: {reader.open}")
    unknown = {name for name, _ in page.elements} - ALLOWED
    if unknown:
        page.problems.append(f"elements that no page of ours has: {sorted(unknown)}")
    return page


def problems(text: str) -> list[str]:
    """What keeps a page from being whole, self-contained and accessible."""
    page = read_page(text)
    found = list(page.problems)
    for element, attributes in page.elements:
        for name, value in attributes.items():
            if name.startswith("on") or name in ("src", "srcset", "action", "data", "xlink:href"):
                found.append(f"<{element}> has {name}")
            if name == "href" and not value.startswith(("#", "https://")):
                found.append(f"a link to {value!r}")
        if element == "svg" and attributes.get("aria-hidden") != "true":
            found.append("a drawing that is not hidden from screen readers")
        if element == "th" and "scope" not in attributes:
            found.append("a table header without a scope")
    ids = page.attributes("id")
    found += [f"the id {id!r} is there twice" for id in {i for i in ids if ids.count(i) > 1}]
    targets = [value[1:] for value in page.attributes("href") if value.startswith("#")]
    targets += page.attributes("aria-labelledby")
    found += [f"nothing has the id {target!r}" for target in targets if target not in ids]
    levels = [level for level, _ in page.headings]
    if levels.count(1) != 1 or levels[0] != 1:
        found.append("not one heading of the first level, at the top")
    found += [
        f"a heading of level {below} follows one of level {above}"
        for above, below in pairwise(levels)
        if below > above + 1
    ]
    for word in ("url(", "@import", "expression("):
        if word in text.split("</style>")[0]:
            found.append(f"the style has {word}")
    return found
