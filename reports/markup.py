"""HTML that cannot be injected into: text is escaped unless it is already `Markup`.

Names of layers, files and tokens come from checkpoints and texts that others wrote. Everything that
reaches the page goes through `el` (elements) or `json_for_script` (data), so that no caller has to
remember to escape.
"""

import html
import json
from collections.abc import Iterable
from typing import Any

_SCRIPT_ESCAPES = str.maketrans(
    {
        "<": "\\u003c",
        ">": "\\u003e",
        "&": "\\u0026",
        "\u2028": "\\u2028",
        "\u2029": "\\u2029",
    }
)
_VOID = frozenset({"meta", "br", "hr", "col"})


class Markup(str):
    """Text that is HTML already and is not escaped again."""

    __slots__ = ()


Child = str | int | None
Children = Child | Iterable[Child]


def text(child: Child) -> Markup:
    """Return a child as HTML: Markup as it is, None as nothing, anything else escaped."""
    if child is None:
        return Markup("")
    return child if isinstance(child, Markup) else Markup(html.escape(str(child), quote=True))


def join(*children: Children) -> Markup:
    """Return the children one after the other; lists are flattened one level."""
    parts: list[str] = []
    for child in children:
        if child is None or isinstance(child, str | int):
            parts.append(text(child))
        else:
            parts.extend(text(part) for part in child)
    return Markup("".join(parts))


def el(tag: str, *children: Children, **attributes: str | int | bool | None) -> Markup:
    """Return an element; `class_` and `aria_label` are spelled class and aria-label.

    An attribute that is None or False is left out, True stands alone.
    """
    spelled = ""
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        name = key.rstrip("_").replace("_", "-")
        spelled += f" {name}" if value is True else f' {name}="{text(str(value))}"'
    if tag in _VOID:
        return Markup(f"<{tag}{spelled}>")
    return Markup(f"<{tag}{spelled}>{join(*children)}</{tag}>")


def json_for_script(value: Any) -> Markup:
    """Return JSON that is safe inside a script element; NaN and infinity raise ValueError."""
    spelled = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # Lone surrogates are legal in JSON strings and in Python, but not in a UTF-8 file.
    spelled = spelled.encode("utf-8", "backslashreplace").decode()
    return Markup(spelled.translate(_SCRIPT_ESCAPES))


def table(
    header: Iterable[Child], rows: Iterable[Iterable[Child]], *, class_: str | None = None
) -> Markup:
    """Return a table whose first column heads its rows."""
    body = [
        el("tr", [el("td" if i else "th", cell, scope=None if i else "row") for i, cell in row])
        for row in (enumerate(cells) for cells in rows)
    ]
    head = el("tr", [el("th", cell, scope="col") for cell in header])
    return el(
        "div", el("table", el("thead", head), el("tbody", body), class_=class_), class_="wide"
    )
