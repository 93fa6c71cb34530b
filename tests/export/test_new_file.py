"""Outputs appear whole or not at all."""

import os

import pytest

import fastslim
from fastslim.export.new_file import new_file, new_folder


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "deep" / "x.bin"
    with new_file(path, ".bin", overwrite=False) as place:
        place.write_text("old")

    def fail():
        with new_file(path, ".bin", overwrite=True) as place:
            place.write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_text() == "old"
    assert os.listdir(path.parent) == ["x.bin"]


def test_a_folder_appears_when_it_is_complete(tmp_path):
    with new_folder(tmp_path / "x") as folder:
        (folder / "a").write_text("a")
        assert not (tmp_path / "x").exists()
    assert os.listdir(tmp_path) == ["x"] and os.listdir(tmp_path / "x") == ["a"]


def test_left_overs_of_a_killed_process_do_not_disturb(tmp_path):
    (tmp_path / f".x.bin.{os.getpid()}.tmp").mkdir()
    with new_file(tmp_path / "x.bin", ".bin", overwrite=False) as place:
        place.write_text("new")
    assert os.listdir(tmp_path) == ["x.bin"]


def test_places_that_cannot_be_written_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    for path, message in (
        (tmp_path / "file" / "x.bin", "cannot write .*x.bin"),
        (tmp_path, "must end in"),
        (tmp_path / "file", "must end in"),
    ):
        with pytest.raises(fastslim.FastslimError, match=message), new_file(path, ".bin", overwrite=True):
            pass
    (tmp_path / "folder.bin").mkdir()
    with pytest.raises(fastslim.FastslimError, match="is a folder"), new_file(tmp_path / "folder.bin", ".bin", True):
        pass
