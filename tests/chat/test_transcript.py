"""A conversation as HTML: what was said is text there, whatever it looks like."""

from __future__ import annotations

import html

from hypothesis import given
from hypothesis import strategies as st

from kestrel.chat.conversation import Exchange
from kestrel.chat.transcript import as_text, transcript


@given(st.text())
def test_what_is_said_is_text_and_no_template(text):
    shown = as_text(text)
    assert html.unescape(shown) == html.unescape(html.escape(text))
    assert not set("<>\"'${}`@") & set(shown)
    page = transcript([Exchange(text, "adapter", text, {"base": text})])
    assert page.count("<p") == 3 and page.count("<") == transcript([Exchange("", "adapter", "", {"base": ""})]).count(
        "<"
    )
