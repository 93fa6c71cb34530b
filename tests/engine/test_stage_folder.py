"""Folders of commands: what may begin, what goes on, what is refused, and that nothing of others is touched."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastslim.engine.stage_folder import StageFolder, digest_of
from fastslim.engine.stage_options import ExportOptions
from fastslim.errors import FastslimError, FastslimFileError, FastslimValueError

OPTIONS, MADE_OF = ExportOptions(width=(0.5,)), {"supernet": "1a"}


def folder_of(path: Path) -> StageFolder:
    return StageFolder(path / "export", "export.json", "export", "--out")


def finished(path: Path, options: ExportOptions = OPTIONS, made_of: dict[str, str] = MADE_OF, **how: bool) -> object:
    return folder_of(path).finished(options, made_of, **{"resume": False, "overwrite": False, **how})


def test_a_new_folder_begins_and_looking_at_it_writes_nothing(tmp_path: Path) -> None:
    assert finished(tmp_path) is None and not (tmp_path / "export").exists()
    folder_of(tmp_path).begin(OPTIONS, MADE_OF)
    assert folder_of(tmp_path).saved_options(ExportOptions) == OPTIONS


def test_what_is_unfinished_goes_on_or_begins_again_when_asked(tmp_path: Path) -> None:
    folder_of(tmp_path).begin(OPTIONS, MADE_OF)
    with pytest.raises(
        FastslimValueError, match="holds an unfinished export: continue it with --resume, or choose anoth"
    ):
        finished(tmp_path)
    for how in ("resume", "overwrite", "again"):
        assert finished(tmp_path, **{how: True}) is None


def test_what_is_finished_is_given_back_until_something_changes(tmp_path: Path) -> None:
    folder_of(tmp_path).begin(OPTIONS, MADE_OF)
    folder_of(tmp_path).write(OPTIONS, MADE_OF, finished=True, files=[1, 2])
    results = finished(tmp_path, OPTIONS.replace(device="cpu"))
    assert isinstance(results, dict) and results["files"] == [1, 2]
    with pytest.raises(
        FastslimValueError, match=r"with other options \(images: 64 there, 9 here\): choose another --out"
    ):
        finished(tmp_path, OPTIONS.replace(images=9))
    with pytest.raises(FastslimValueError, match="the supernet or the subnets have changed since"):
        finished(tmp_path, made_of={"supernet": "2b"})
    assert finished(tmp_path, OPTIONS.replace(images=9), overwrite=True) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is damaged"), ("[]", "is not of fastslim"), ('{"finished": true}', "is not of fastslim")],
)
def test_a_foreign_file_is_not_taken_for_results(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "export.json").write_text(text)
    with pytest.raises(FastslimFileError, match=message):
        finished(tmp_path)


def test_left_overs_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    half = tmp_path / "export" / ".a.onnx.77.tmp"
    half.mkdir(parents=True)
    (half / "a.onnx").write_bytes(b"half of it")
    (tmp_path / "export" / ".export.json.77.tmp").write_text("{")
    folder_of(tmp_path).begin(OPTIONS, MADE_OF)
    assert [path.name for path in (tmp_path / "export").iterdir()] == ["export.json"]


def test_a_place_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "export").write_text("precious")
    with pytest.raises(FastslimError, match="export cannot be written to"):
        folder_of(tmp_path).begin(OPTIONS, MADE_OF)


def test_digests_tell_files_apart(tmp_path: Path) -> None:
    for name, content in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        (tmp_path / name).write_bytes(content)
    assert digest_of(tmp_path / "a") == digest_of(tmp_path / "b") != digest_of(tmp_path / "c")
    with pytest.raises(FastslimFileError, match="there is no checkpoint .*: train the supernet first"):
        digest_of(tmp_path / "none")
