import json
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitplan.reports.markup import Markup, el, join, json_for_script, table

HOSTILE = "</script><img src=x onerror=alert(1)>\"'&\u2028"
# HTML has no spelling for NUL and turns CR into LF: neither is an injection.
any_text = st.text(st.characters(exclude_characters="\0\r", exclude_categories=["Cs"]))


class Reader(HTMLParser):
    """Collects what a browser would make of some HTML: elements and text."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


@given(any_text, any_text)
def test_any_text_stays_text(content: str, value: str) -> None:
    read = Reader(el("p", content, title=value))
    assert (read.tags, read.text, read.attributes) == (["p"], content, [("title", value)])


@given(any_text)
def test_json_in_a_script_survives_and_cannot_end_it(content: str) -> None:
    spelled = json_for_script({"site": content})
    assert json.loads(spelled) == {"site": content}
    assert "<" not in spelled
    assert ">" not in spelled


def test_json_with_nan_is_an_error() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        json_for_script([float("nan")])


def test_a_lone_surrogate_can_be_written_as_utf8() -> None:
    assert json.loads(json_for_script("a\ud800b").encode()) == "a\ud800b"


def test_markup_is_not_escaped_twice_and_lists_are_flattened() -> None:
    assert join(Markup("<b>"), ["<", None, 3]) == "<b>&lt;3"
    assert el("br") == "<br>"
    assert (
        el("p", hidden=True, id=None, class_="a", data_n=1) == '<p hidden class="a" data-n="1"></p>'
    )


def test_a_table_escapes_its_cells() -> None:
    read = Reader(table([HOSTILE], [[HOSTILE, HOSTILE]]))
    assert set(read.tags) == {"div", "table", "thead", "tbody", "tr", "th", "td"}
    assert read.text == HOSTILE * 3
