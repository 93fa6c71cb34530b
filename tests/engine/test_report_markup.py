"""Markup: what comes from elsewhere is text."""

from __future__ import annotations

from fastslim.engine.report_markup import Markup, element, join


def test_texts_and_attributes_are_escaped_and_markup_is_not() -> None:
    inner = element("b", "<i> & 'x'")
    assert inner == "<b>&lt;i&gt; &amp; &#x27;x&#x27;</b>"
    assert element("p", inner, None, 7, title='"><script>', hidden=True, lang=None) == (
        f'<p title="&quot;&gt;&lt;script&gt;" hidden>{inner}7</p>'
    )
    assert join("<", Markup("<br>")) == "&lt;<br>"


def test_names_of_attributes_and_numbers() -> None:
    assert (
        element("line", x1=1.26, x2=3.0, class_="a", data_tip="t")
        == '<line x1="1.3" x2="3" class="a" data-tip="t"></line>'
    )
    assert element("meta", name="n") == '<meta name="n">'
