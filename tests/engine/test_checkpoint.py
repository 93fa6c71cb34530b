"""Checkpoints: exact round trips, and files that are damaged, foreign or of another model."""

from __future__ import annotations

import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fastslim import files
from fastslim.engine.checkpoint import load_checkpoint, load_model, rng_state, save_checkpoint, set_rng_state
from fastslim.errors import FastslimFileError


def small_state() -> dict[str, Any]:
    return {
        "model": {"weight": torch.randn(300, 50)},
        "epoch": 3,
        "step": 66,
        "config": {"seed": 0, "choices": [0.5, 1.0]},
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "last.pt"


def test_round_trip_is_exact(path: Path) -> None:
    state = small_state()
    save_checkpoint(path, state)
    loaded = load_checkpoint(path)
    assert torch.equal(loaded.pop("model")["weight"], state.pop("model")["weight"])
    assert loaded == {**state, "format": "fastslim-checkpoint-1"}


def test_random_generators_continue_where_they_were(path: Path) -> None:
    save_checkpoint(path, {**small_state(), "random": rng_state()})

    def draw() -> tuple[float, float, float, float]:
        return torch.rand(()).item(), np.random.rand(), random.random(), random.gauss(0, 1)

    expected = draw()
    draw()
    set_rng_state(load_checkpoint(path)["random"])
    assert draw() == expected


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, 0.99])
def test_truncated_file_is_refused(path: Path, kept: float) -> None:
    save_checkpoint(path, small_state())
    whole = path.read_bytes()
    part = whole[: int(kept * len(whole)) if isinstance(kept, float) else kept]
    path.write_bytes(part)
    with pytest.raises(
        FastslimFileError, match=rf"last\.pt is truncated \({len(part)} bytes\): delete it and go on from"
    ):
        load_checkpoint(path)
    assert path.read_bytes() == part


def test_flipped_bits_in_the_structure_are_refused(path: Path) -> None:
    save_checkpoint(path, small_state())
    content = bytearray(path.read_bytes())
    start = content.index(b"data.pkl") + 8
    content[start : start + 200] = b"\xa5" * 200
    path.write_bytes(content)
    with pytest.raises(FastslimFileError, match=r"last\.pt is (damaged|not a fastslim checkpoint)"):
        load_checkpoint(path)


class Payload:
    def __init__(self, victim: str) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.mkdir, (self.victim,)


@pytest.mark.parametrize(
    ("writer", "message"),
    [("torch", "no code in a file is ever executed"), ("pickle", "it was not written by torch.save")],
)
def test_no_code_in_a_file_is_executed(path: Path, tmp_path: Path, writer: str, message: str) -> None:
    victim = tmp_path / "made_by_pickle"
    if writer == "torch":
        torch.save({"model": Payload(str(victim))}, path)
    else:
        path.write_bytes(pickle.dumps(Payload(str(victim))))
    with pytest.raises(FastslimFileError, match=message):
        load_checkpoint(path)
    assert not victim.exists()


@pytest.mark.parametrize(
    ("content", "held"),
    [
        (nn.Linear(2, 2).state_dict(), "the entries weight, bias"),
        ({"state_dict": {}, "epoch": 1, "arch": "resnet", "best": 0}, "the entries state_dict, epoch, arch, ..."),
        (torch.zeros(3), "a Tensor"),
        ({"format": "fastslim-checkpoint-1", "model": {}}, "the entries format, model"),
    ],
)
def test_foreign_file_is_described(path: Path, content: object, held: str) -> None:
    torch.save(content, path)
    with pytest.raises(FastslimFileError, match=rf"last\.pt is not a fastslim checkpoint: it holds {held}$"):
        load_checkpoint(path)


def test_text_and_missing_files_are_refused(path: Path) -> None:
    with pytest.raises(FastslimFileError, match="there is no checkpoint"):
        load_checkpoint(path)
    path.write_text("epochs: 3\n")
    with pytest.raises(FastslimFileError, match="is not a fastslim checkpoint"):
        load_checkpoint(path)


def test_ctrl_c_in_the_middle_of_saving_leaves_the_old_checkpoint(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = small_state()
    save_checkpoint(path, state)
    before = path.read_bytes()

    def interrupted_save(content: object, stream: Any) -> None:
        stream.write(b"PK\x03\x04 half a checkpoint")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", interrupted_save)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(path, small_state())
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]
    assert torch.equal(load_checkpoint(path)["model"]["weight"], state["model"]["weight"])


def test_new_content_is_on_disk_before_the_old_is_replaced(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("fsync", "replace"):
        original = getattr(files.os, name)
        monkeypatch.setattr(
            files.os, name, lambda *a, original=original, name=name: (calls.append(name), original(*a))[1]
        )
    save_checkpoint(path, small_state())
    assert calls == ["fsync", "replace", "fsync"]


def net(hidden: int = 4, classes: int = 2) -> nn.Module:
    return nn.Sequential(nn.Linear(3, hidden), nn.BatchNorm1d(hidden), nn.Linear(hidden, classes))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (net(classes=5), "its '2.weight' has shape (5, 4), the model's (2, 4) (2 entries differ)"),
        (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), "it has no '2.weight' (2 entries differ)"),
        (nn.Sequential(*net(), nn.Linear(2, 2)), "its '3.weight' has no place in the model (2 entries differ)"),
        (nn.Sequential(nn.Linear(3, 7)), "it has no '1.weight'; its '0.weight' has shape (7, 3), the model's (4, 3)"),
    ],
)
def test_checkpoint_of_another_model_is_named_and_the_model_kept(path: Path, other: nn.Module, message: str) -> None:
    model = net()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(FastslimFileError) as caught:
        load_model(model, other.state_dict(), path)
    assert f"{path} is the checkpoint of another model: {message}" in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_checkpoint_of_the_same_model_is_loaded() -> None:
    model, other = net(), net()
    load_model(model, other.state_dict(), Path("last.pt"))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
