"""The picture of widths: names that tell units apart."""

from __future__ import annotations

from fastslim.engine.report_widths import Column, short_names, widths_figure


def test_names_lose_what_all_share_but_stay_different() -> None:
    assert short_names(["net.a.conv_(0, 8)_8", "net.b.conv_(0, 8)_8"]) == ["a.conv", "b.conv"]
    assert short_names(["a.conv_(0, 8)_8", "b.conv_(0, 8)_8"]) == ["a.conv", "b.conv"]
    assert short_names(["a.qkv_(0, 8)_16", "a.qkv_(8, 16)_16"]) == ["a.qkv_(0, 8)_16", "a.qkv_(8, 16)_16"]
    assert short_names(["only.one_(0, 8)_8"]) == ["only.one"]
    assert short_names(["a", "a.b"]) == ["a", "a.b"]


def test_a_unit_that_a_subnet_does_not_name_is_left_open() -> None:
    figure = widths_figure({"a": 8, "b": 16}, [Column("half", "detail", {"a": 4})])
    assert "a: 4 of 8 channels (50 %)" in figure and "width:50.0%" in figure
    assert figure.count('class="bar c-') == 1 and "<div>–</div>" in figure
