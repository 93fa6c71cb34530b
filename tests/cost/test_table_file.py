"""Measured times on disk: kept apart by machine, replaced when damaged, shared by processes."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch

from fastslim.cost.place import Place
from fastslim.cost.table_file import TableFile, cache_folder, hardware_name, table_key
from fastslim.errors import FastslimFileError

PLACE = Place(torch.device("cpu"), torch.float32, 1, False)
KEY = table_key(PLACE, "a clock")


def filled(folder: Path, **times: float) -> TableFile:
    table = TableFile(KEY, folder)
    for what, seconds in times.items():
        table.add(what, seconds)
    table.save()
    return table


def test_what_is_saved_is_found_again(tmp_path: Path) -> None:
    filled(tmp_path, conv=0.5, relu=0.25)
    table = TableFile(KEY, tmp_path)
    assert (table.seconds("conv"), table.seconds("relu"), table.seconds("add")) == (0.5, 0.25, None)
    assert [path.name for path in (tmp_path / "latency").iterdir()] == [table.path.name if table.path else ""]


def test_the_median_counts() -> None:
    table = TableFile(KEY, None)
    for seconds in (1.0, 50.0, 1.5):
        table.add("conv", seconds)
    assert table.seconds("conv") == 1.5


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    table = TableFile(KEY, None)
    table.add("conv", 1.0)
    table.save()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", ["hardware", "threads", "dtype", "batch_size", "channels_last", "torch", "clock"])
def test_other_circumstances_have_a_file_of_their_own(tmp_path: Path, change: str) -> None:
    filled(tmp_path, conv=0.5)
    assert change in KEY
    assert TableFile({**KEY, change: "another"}, tmp_path).seconds("conv") is None


def test_the_key_names_the_machine_and_the_way_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    key = table_key(dataclasses.replace(PLACE, dtype=torch.bfloat16, batch_size=3), "a clock")
    assert (key["threads"], key["dtype"], key["batch_size"], key["torch"]) == (7, "bfloat16", 3, torch.__version__)
    assert key["hardware"] == hardware_name(torch.device("cpu")) != ""


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: '{"key": {}, "seconds": {}}',
        lambda text: text.replace("0.5", "NaN"),
        lambda text: text.replace("0.5", '"fast"'),
        lambda text: text.replace("0.5", "-1"),
    ],
    ids=["half", "empty", "list", "foreign", "nan", "word", "negative"],
)
def test_a_damaged_file_is_made_again_with_a_warning(tmp_path: Path, damage) -> None:
    path = filled(tmp_path, conv=0.5).path
    assert path is not None
    path.write_text(damage(path.read_text()))
    with pytest.warns(UserWarning, match=r"cannot be used .*; they are measured again and the file is replaced"):
        table = TableFile(KEY, tmp_path)
    assert table.samples == {}
    table.add("conv", 2.0)
    table.save()
    assert TableFile(KEY, tmp_path).seconds("conv") == 2.0


def test_times_of_two_processes_come_together(tmp_path: Path) -> None:
    one, other = TableFile(KEY, tmp_path), TableFile(KEY, tmp_path)
    one.add("conv", 1.0)
    other.add("relu", 2.0)
    one.save()
    other.save()
    assert set(json.loads(other.path.read_text())["seconds"]) == {"conv", "relu"} if other.path else False


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = filled(tmp_path, conv=0.5)
    table.add("relu", 1.0)

    def full_disk(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(FastslimFileError, match=r"cannot be kept in .* No space left on device\); choose another"):
        table.save()
    monkeypatch.undo()
    assert TableFile(KEY, tmp_path).samples == {"conv": [0.5]}
    assert len(list((tmp_path / "latency").iterdir())) == 1


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    table = TableFile(KEY, tmp_path / "file")
    with pytest.raises(FastslimFileError, match=r"cannot be kept in .*latency"):
        table.save()


def test_the_folder_is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSLIM_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("FASTSLIM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "fastslim"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "fastslim"
