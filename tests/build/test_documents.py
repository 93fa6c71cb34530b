"""The documents keep up with the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_every_environment_variable_is_in_the_table():
    patterns = ("fastslim/**/*.py", "csrc/**/*.cpp", "kernels/*.py", "setup.py")
    sources = [path for pattern in patterns for path in ROOT.glob(pattern)]
    read = re.compile(r"(?:getenv|environ(?:\.get)?)\s*[\[(]\s*[\"'](FASTSLIM_\w+)")
    used = {name for path in sources for name in read.findall(path.read_text())}
    table = (ROOT / "CONTRIBUTING.md").read_text().split("## Environment variables")[1]
    assert used
    assert {name for name in used if f"`{name}`" not in table} == set()


def test_every_make_word_in_the_documents_exists():
    words = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    documents = [ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")]
    mentioned = {word for path in documents for word in re.findall(r"\bmake ([a-z-]+)", path.read_text())}
    assert mentioned - words == set()


DOCUMENTS = ["README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in sorted(ROOT.glob("docs/*.md")))]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_and_paths_lead_somewhere(document):
    text = (ROOT / document).read_text()
    for link in re.findall(r"\]\((?!https?:)([^)#\s]+)", text):
        assert ((ROOT / document).parent / link).exists(), link
    for path in re.findall(r"`((?:tests|benchmarks|csrc|fastslim|docs)/[\w./]+)`", text):
        assert (ROOT / path).exists(), path


def test_the_example_of_converting_runs(capsys):
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs/converting.md").read_text(), re.DOTALL)
    exec(compile(code.group(1), "docs/converting.md", "exec"), {})
    assert capsys.readouterr().out.startswith("ResNet: 12 channel units, 41 of 41 layers change their width")


def test_the_keys_of_the_report_are_documented():
    from dataclasses import fields

    from fastslim.graph import Finding, LayerRow, Report, UnitSpec

    text = (ROOT / "docs/converting.md").read_text()
    keys = {
        *Report("", (), ()).to_dict(),
        *(field.name for kind in (Finding, LayerRow, UnitSpec) for field in fields(kind)),
    }
    assert {key for key in keys if f"`{key}`" not in text} == set()
