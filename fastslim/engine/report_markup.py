"""HTML and SVG in which every text is escaped, unless it was made here."""

from __future__ import annotations

import html

VOID = frozenset({"meta", "br"})


class Markup(str):
    """A finished piece of a page; every other string is escaped before it becomes part of one."""

    __slots__ = ()


def element(name: str, /, *children: object, **attributes: object) -> Markup:
    """One element with what it contains.

    Args:
        name: of the tag.
        children: markup as it is, texts escaped; None is left out.
        attributes: ``class_`` is written class, ``data_tip`` data-tip; None and False are left out, True has no value,
            numbers are rounded to a tenth (of a pixel).
    """
    written = [_attribute(key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items()]
    start = f"<{' '.join([name, *filter(None, written)])}>"
    return Markup(start if name in VOID else f"{start}{join(*children)}</{name}>")


def join(*children: object) -> Markup:
    """Pieces one after the other."""
    return Markup("".join(_escaped(child) for child in children if child is not None))


def _escaped(child: object) -> str:
    return child if isinstance(child, Markup) else html.escape(str(child))


def _attribute(name: str, value: object) -> str:
    if value is None or value is False:
        return ""
    if value is True:
        return name
    text = f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)
    return f'{name}="{html.escape(text)}"'
