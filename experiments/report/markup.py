"""HTML that is escaped by the way it is made: only what `tag` and `join` return is markup, all else is text."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape


class Html(str):
    """A string that is markup."""

    __slots__ = ()


Content = str | Html | None

VOID = frozenset({"img", "meta", "br", "hr"})
"""Elements that have no end."""


def tag(name: str, /, *content: Content, **attributes: str | int | bool | None) -> Html:
    """An element.

    Args:
        name: Of the element.
        *content: Texts, which are escaped, and markup, which is not; None is left out.
        **attributes: ``class_`` is written ``class``, ``data_label`` is ``data-label``; True stands without a value,
            None and False are left out.
    """
    words = [name]
    for key, value in attributes.items():
        written = key.rstrip("_").replace("_", "-")
        if value is True:
            words.append(written)
        elif value is not None and value is not False:
            words.append(f'{written}="{escape(str(value))}"')
    opening = f"<{' '.join(words)}>"
    return Html(opening) if name in VOID else Html(f"{opening}{join(content)}</{name}>")


def join(content: Iterable[Content], between: Content = "") -> Html:
    """Texts and markup one after the other."""
    return Html(_safe(between).join(_safe(part) for part in content if part is not None))


def _safe(part: Content) -> str:
    return str(part) if isinstance(part, Html) else escape(part or "")
