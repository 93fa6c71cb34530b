"""The page about a run: its numbers are those of the files, it needs nothing else, and damaged files stop it."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import report_cases as cases
from PIL import Image

from fastslim.engine.evaluate import format_count
from fastslim.engine.report import make_report
from fastslim.errors import FastslimFileError

VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """The texts of a page, its ids and links; refuses elements that are closed in the wrong order or not at all."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def of(self, name: str) -> list[str]:
        """All values of an attribute."""
        return [value or "" for _, key, value in self.attributes if key == name]


def report(run: Path) -> Page:
    return Page(make_report(run).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with all parts, and its report."""
    run = cases.write_run(tmp_path_factory.mktemp("whole") / "run")
    assert make_report(run) == run / "report.html"
    return run


@pytest.fixture(scope="module")
def page(whole: Path) -> Page:
    return Page((whole / "report.html").read_text(encoding="utf-8"))


def test_numbers_of_uniform_widths_are_those_of_results_json(whole: Path, page: Page) -> None:
    rows = json.loads((whole / "results.json").read_text())["widths"]
    assert len(rows) == 4
    for row in rows:
        assert (
            f"{row['width']:.2f}× {format_count(row['multiply_adds'])} "
            f"{100 * row['multiply_adds'] / rows[-1]['multiply_adds']:.1f} % {format_count(row['parameters'])} "
            f"{100 * row['accuracy']:.2f} % {row['loss']:.3f}"
        ) in page.text


def test_found_subnets_stand_beside_their_held_out_accuracy_and_a_uniform_width(whole: Path, page: Page) -> None:
    found = json.loads((whole / "search" / "report.json").read_text())["found"]
    held_out = json.loads((whole / "search" / "results.json").read_text())["subnets"]
    for one, row in zip(found, held_out, strict=True):
        word = {"flops": "multiply-adds", "parameters": "parameters"}[one["cost"]]
        pattern = (
            f"{row['name']} ≤ {100 * one['budget']:g} % of {word}, greedy {format_count(one['costs']['flops'])}, "
            f"[0-9.]+ % {format_count(one['costs']['parameters'])}, [0-9.]+ % {100 * one['score']:.2f} % "
            f"{100 * row['accuracy']:.2f} % 0.75×: {100 * row['uniform']['accuracy']:.2f} %"
        )
        assert re.search(pattern, page.text), pattern


def test_a_search_without_held_out_results_does_not_take_those_of_another(page: Page) -> None:
    assert re.search(
        r"flops-0.5 ≤ 50 % of multiply-adds, evolution \S+ M, [0-9.]+ % \S+ k, [0-9.]+ % [0-9.]+ % – –", page.text
    )


def test_retrained_subnets_show_before_after_and_gain(whole: Path, page: Page) -> None:
    for name in ("flops-0.5", "flops-0.25"):
        results = json.loads((whole / "retrain" / name / "results.json").read_text())
        before, after = results["before"], results["after"]
        assert (
            f"{name} {format_count(after['multiply_adds'])} {format_count(after['parameters'])} "
            f"{100 * before['accuracy']:.2f} % {100 * after['accuracy']:.2f} % +0.60 "
            "from the supernet's weights, learns from the full width"
        ) in page.text


def test_exported_files_show_size_and_difference(page: Page) -> None:
    assert "flops-0.5 subnet (safetensors and JSON) 131 kB 1.9e-06 11.5" in page.text
    assert "flops-0.5.onnx ONNX model 131 kB 2.4e-06 11.5" in page.text
    assert "flops-0.5.pt2 torch.export program 131 kB 0 11.5" in page.text
    assert "by_hand.pt2 torch.export program 1.5 MB not compared –" in page.text
    assert page.text.count("flops-0.5.pt2") == 1


def test_an_exported_file_that_was_moved_away_is_said(tmp_path: Path) -> None:
    cases.write_export(tmp_path)
    (tmp_path / "export" / "flops-0.5.onnx").unlink()
    assert "flops-0.5.onnx ONNX model no longer there" in report(tmp_path).text


def test_latency_shows_each_subnet_and_the_errors(whole: Path, page: Page) -> None:
    rows = json.loads((whole / "latency.json").read_text())["rows"]
    for row in rows:
        error = 100 * (row["predicted"] / row["measured"] - 1)
        assert f"{row['predicted']:.3f} {row['measured']:.3f} {error:+.1f} %" in page.text
    assert "median 3.0 %, largest 8.0 %" in page.text


def test_every_width_of_every_unit_is_in_the_picture(whole: Path, page: Page) -> None:
    tips = page.of("data-tip")
    for folder in ("search", "search-evolution"):
        for found in json.loads((whole / folder / "report.json").read_text())["found"]:
            for unit, width in found["subnet"].items():
                name, full = unit.split("_(")[0], cases.FULL[unit]
                assert f"{name}: {width} of {full} channels ({100 * width / full:.0f} %)" in tips


def test_points_say_their_numbers(whole: Path, page: Page) -> None:
    tips = page.of("data-tip")
    records = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        if record["kind"] == "epoch":
            losses = record["losses"]
            assert f"max subnet, loss\nepoch {record['epoch']}: {losses['max_subnet.loss']:.4f}" in tips
            mean = (losses["random_subnet_0.loss_kl"] + losses["random_subnet_1.loss_kl"]) / 2
            assert f"random subnets, loss_kl\nepoch {record['epoch']}: {mean:.4f}" in tips
        for row in record.get("widths", ()):
            assert f"{row['width']:.2f}×\nepoch {record['epoch']}: {100 * row['accuracy']:.2f} %" in tips


def test_footer_says_where_numbers_come_from(page: Page) -> None:
    assert "trained on x86_64, 2 threads trained with fastslim 0.1.0, torch 2.13.0+cpu" in page.text
    assert re.search(r"report made \d{4}-\d\d-\d\d \d\d:\d\d", page.text)
    assert re.search(r"lr 0\.1 0\.05", page.text), "the configuration, with the usual value beside it"


def test_commit_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSLIM_COMMIT", "c0ffee")
    cases.write_training(tmp_path)
    assert "commit c0ffee" in report(tmp_path).text


def test_page_needs_no_other_file(whole: Path) -> None:
    text = (whole / "report.html").read_text(encoding="utf-8")
    assert "http" not in text and "url(" not in text and "@import" not in text
    page = Page(text)
    assert not page.of("src") and not {"link", "img", "iframe", "object"} & set(page.tags)
    assert all(link.startswith("#") and link[1:] in page.of("id") for link in page.of("href"))


def test_page_fits_phones_and_follows_light_and_dark(whole: Path, page: Page) -> None:
    text = (whole / "report.html").read_text(encoding="utf-8")
    assert "prefers-color-scheme:dark" in text
    assert ("meta", "content", "width=device-width, initial-scale=1") in page.attributes
    classes = page.of("class")
    assert classes.count("wide") == classes.count("narrow") == 10


def test_ids_are_unique(page: Page) -> None:
    ids = page.of("id")
    assert len(ids) == len(set(ids)) > 4


def test_every_axis_has_its_unit(whole: Path, page: Page) -> None:
    for label in (
        "multiply-adds of one image (log scale)", "parameters (log scale)", "held-out accuracy, %",
        "search accuracy, %", "loss, nats", "epoch", "learning rate", "images/s", "measured, ms", "predicted, ms",
    ):  # fmt: skip
        assert label in page.texts, label


def test_pictures_lie_beside_the_page(whole: Path) -> None:
    names = {path.stem for path in (whole / "report").iterdir()}
    assert names == {
        "accuracy_multiply_adds", "accuracy_parameters", "search_multiply_adds", "search_parameters", "widths",
        "losses", "accuracy_epochs", "learning_rate", "speed", "retraining", "latency",
    }  # fmt: skip
    for name in names:
        with Image.open(whole / "report" / f"{name}.png") as image:
            assert image.format == "PNG" and image.width > 500
            assert len(set(image.convert("L").tobytes())) > 20, f"{name} is empty"


PARTS = {
    "training": (("config.yaml", "metrics.jsonl", "results.json"), "No epoch is recorded yet: fastslim train --run"),
    "search": (("search", "search-evolution"), "No search yet: fastslim search"),
    "retraining": (("retrain",), "No subnet was trained alone yet: fastslim retrain"),
    "export": (("export",), "Nothing was exported yet: fastslim export"),
    "latency": (("latency.json",), "No latency was checked yet"),
}


@pytest.mark.parametrize("part", PARTS)
def test_a_missing_part_says_how_to_make_it(whole: Path, tmp_path: Path, part: str) -> None:
    files, sentence = PARTS[part]
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    for name in files:
        shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()
    text = report(run).text
    assert sentence in text
    for other, (_, missing) in PARTS.items():
        assert other == part or missing not in text


@pytest.mark.parametrize("part", ["training", "search", "retrained", "export", "latency"])
def test_each_part_alone_makes_a_page(tmp_path: Path, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    getattr(cases, f"write_{part}")(tmp_path)
    assert "Accuracy against cost" in report(tmp_path).text
    assert not (tmp_path / "report").exists(), "no matplotlib, no pictures"


def test_pictures_of_an_earlier_report_go(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / "report" / "my own.png").write_bytes(b"mine")
    (run / "latency.json").unlink()
    make_report(run)
    assert not (run / "report" / "latency.png").exists()
    assert (run / "report" / "my own.png").read_bytes() == b"mine"


def test_an_unfinished_training_is_shown_as_far_as_it_is(tmp_path: Path) -> None:
    cases.write_training(tmp_path, finished=False)
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"kind": "epo')  # a kill
    page = report(tmp_path)
    assert (
        f"The training is not finished: 6 of 6 epochs are done. Go on with fastslim train --run {tmp_path}" in page.text
    )
    assert "1.00× 10.3 M 100.0 %" in page.text


def test_an_unfinished_search_is_shown_as_far_as_it_is(tmp_path: Path) -> None:
    cases.write_search(tmp_path, held_out=False)
    (tmp_path / "search" / "report.json").unlink()
    page = report(tmp_path)
    assert "The search in search is not finished, 64 subnets are evaluated: fastslim search" in page.text
    assert "evaluated, 64 subnets" in page.text


def test_scores_of_a_search_are_not_mixed_into_the_held_out_front(tmp_path: Path) -> None:
    cases.write_training(tmp_path)
    cases.write_search(tmp_path, held_out=False)
    text = report(tmp_path).text
    assert "found subnets by their score in the search" in text
    assert text.count("Pareto front") == 2, "of what the search saw, by both costs"


def test_budgets_of_latency_and_memory_are_shown_in_their_units(tmp_path: Path) -> None:
    cases.write_search(tmp_path, held_out=False)
    file = tmp_path / "search" / "report.json"
    content = json.loads(file.read_text())
    for one in (content["full"], *content["found"], *content["evaluated"]):
        one["costs"] |= {"memory": 4 * one["costs"]["parameters"], "latency": one["costs"]["flops"] / 2e6}
    fast, small = content["found"][:2]
    fast.update(cost="latency", budget=3.5, limit=3.5)
    small.update(cost="memory", budget=0.25, limit=0.25 * content["full"]["costs"]["memory"])
    file.write_text(json.dumps(content))
    page = report(tmp_path)
    assert "latency-3.5 ≤ 3.5 ms latency 5.01 M, 48.6 %" in page.text
    assert f"{fast['costs']['latency']:.3g} ms, 48.6 %" in page.text
    assert "memory-0.25 ≤ 25 % of activation memory" in page.text
    assert {"predicted latency, ms (log scale)", "activation memory of one image, bytes (log scale)"} <= set(page.texts)
    assert (tmp_path / "report" / "search_latency.png").is_file()


def test_markup_in_files_is_text(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script>&<b>"
    cases.write_training(tmp_path, model=evil)
    cases.write_search(tmp_path)
    saved = (tmp_path / "search" / "report.json").read_text()
    (tmp_path / "search" / "report.json").write_text(saved.replace("layer1.0.conv1", 'layer\\"><i>'))
    page = report(tmp_path)
    assert page.tags.count("script") == 1
    assert f"{evil} on digits" in page.texts
    assert any(value.startswith('layer"><i>') for value in page.of("title"))
    assert "<script>alert" not in (tmp_path / "report.html").read_text()


def damage(run: Path, file: str, content: str) -> None:
    (run / file).parent.mkdir(parents=True, exist_ok=True)
    (run / file).write_text(content)


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("results.json", '{"finished": tr', "it is not JSON"),
        ("results.json", "[1, 2]", "it should be an object, not"),
        ("results.json", '{"widths": [{"width": "wide"}]}', r"widths\[0\].width should be a number, not 'wide'"),
        ("results.json", '{"widths": [{"width": 1.0, "multiply_adds": 5}]}', r"widths\[0\] has no 'parameters'"),
        ("metrics.jsonl", '{"kind": "epoch"\n{}\n', "its line 1 is not JSON"),
        ("metrics.jsonl", '{"kind": "epoch", "epoch": 1}\n', "line 1 has no 'losses'"),
        ("config.yaml", "model: [", "is not plain YAML"),
        ("search/report.json", "{", "not JSON"),
        ("search/report.json", '{"format": "other"}', "is no search report"),
        ("search/results.json", "{", "it is not JSON"),
        ("search/evaluated.jsonl", "{}\n", "line 1 has no"),
        ("retrain/a/results.json", '{"after": {"name": "a"}}', "after has no 'multiply_adds'"),
        ("export/export.json", '{"files": [{"path": 7}]}', r"files\[0\].path should be a text, not 7"),
        ("export/half/subnet.json", "{", "it is not JSON"),
        ("latency.json", '{"rows": [], "where": "here"}', r"rows should be a list of subnets, not \[\]"),
        ("latency.json", "\x00", "it is not JSON"),
    ],
)
def test_a_damaged_file_is_named_and_nothing_is_written(tmp_path: Path, file: str, content: str, sentence: str) -> None:
    cases.write_training(tmp_path)
    cases.write_search(tmp_path)
    if file == "search/evaluated.jsonl":
        (tmp_path / "search" / "report.json").unlink()
    (tmp_path / "report.html").write_text("the old page")
    damage(tmp_path, file, content)
    with pytest.raises(FastslimFileError, match=sentence) as raised:
        make_report(tmp_path)
    assert str(tmp_path / file) in str(raised.value)
    assert (tmp_path / "report.html").read_text() == "the old page"
    assert not (tmp_path / "report").exists()


def test_a_file_that_is_not_utf_8_is_named(tmp_path: Path) -> None:
    cases.write_training(tmp_path)
    (tmp_path / "results.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FastslimFileError, match=r"results\.json is damaged"):
        make_report(tmp_path)


def test_an_interrupted_page_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases.write_training(tmp_path)
    (tmp_path / "report.html").write_text("the old page")

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(FastslimFileError, match="No space left"):
        make_report(tmp_path)
    assert (tmp_path / "report.html").read_text() == "the old page"
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", "metrics.jsonl", "results.json", "report.html"}


def test_folders_without_a_run_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FastslimFileError, match="there is no run folder"):
        make_report(tmp_path / "nowhere")
    with pytest.raises(FastslimFileError, match="holds nothing of a run"):
        make_report(tmp_path)
    cases.write_run(tmp_path / "run")
    with pytest.raises(FastslimFileError, match="retrained subnet: give its run's, .*/run$"):
        make_report(tmp_path / "run" / "retrain" / "flops-0.5")


def test_losses_that_are_no_numbers_leave_gaps(tmp_path: Path) -> None:
    cases.write_training(tmp_path)
    text = (tmp_path / "metrics.jsonl").read_text().splitlines()
    record = json.loads(text[2])
    record["losses"]["max_subnet.loss"] = float("nan")
    text[2] = json.dumps(record)
    (tmp_path / "metrics.jsonl").write_text("\n".join(text) + "\n")
    page = report(tmp_path)
    assert "max subnet, loss\nepoch 2: nan" not in page.of("data-tip")
    assert not any("nan" in value for value in page.of("cx") + page.of("d"))


def test_a_network_of_one_evaluated_width_makes_a_page(tmp_path: Path) -> None:
    cases.write(
        tmp_path / "results.json",
        {"finished": True, "widths": [{"width": 1.0, **cases.measures(cases.FULL)}], "training_seconds": 7200.0},
    )
    text = report(tmp_path).text
    assert "1.00× 10.3 M 100.0 %" in text and "2.0 h" in text
