"""The dispatch table that the kernel benchmark writes: its keys are those the ops' rules ask for."""

from __future__ import annotations

import json

import kernel_cases
import pytest
import record
import torch
from kernel_times import measure
from prepared import Prepared

from fastslim.ops import backend, measured

TARGET = "sm_90"
CPU = torch.device("cpu")


@pytest.fixture
def on_a_gpu(monkeypatch):
    """The rules decide as on an H200; what computes are the backends that also run on CPU tensors."""
    monkeypatch.setattr(backend, "target_of", lambda tensor: TARGET)
    ours = ("cpp", "cuda", "triton")
    monkeypatch.setattr(backend, "unusable", lambda name, target: f"no {name} here" if name in ours else None)
    backend.forget()
    yield
    backend.forget()


def timed(cases, dtype=torch.float32):
    """What the benchmark writes of some cases."""
    entries = []
    for case in cases:
        times, _, asked = measure(case, CPU, dtype, repeats=1)
        medians = {name: spread.median for name, spread in times.items()}
        named = {"op": case.op, "direction": case.direction, "shape": case.shape}
        entries.append({**named, "times": medians, "asked": [list(question) for question in asked]})
    return entries


def result_of(entries):
    about = {"device": "NVIDIA H200", "commit": "abc1234", "torch": "2.11.0"}
    return {"machine": about, "stages": {"kernels": {"data": {"timed": entries, "target": TARGET}}}}


def test_every_key_that_is_written_is_one_a_rule_asks_for(on_a_gpu, tmp_path, monkeypatch):
    entries = timed(kernel_cases.small_cases())
    path = record.record(result_of(entries), tmp_path)
    written = json.loads(path.read_text())
    assert (path.name, written["device"], written["commit"]) == ("sm_90.json", "NVIDIA H200", "abc1234")
    monkeypatch.setattr(measured, "FOLDER", tmp_path)
    backend.forget()
    try:
        with record.questions() as asked:
            for case in kernel_cases.small_cases():
                inputs = case.inputs(CPU, torch.float32)
                with backend.use_backend("library"):
                    Prepared(case, inputs, torch.float32)()
        keys = {(question.key, question.sizes) for question in asked}
        for row in written["rows"]:
            assert (row["key"], tuple(row["sizes"])) in keys
            assert measured.best(TARGET, row["key"], tuple(row["sizes"])).backend == row["best"]
    finally:
        backend.forget()


def test_ops_with_kernels_for_gpus_ask_the_table(on_a_gpu):
    for op, backends in backend.registered_ops().items():
        cases = [case for case in kernel_cases.small_cases() if case.op == op]
        assert cases, f"no benchmark case of {op}"
        if {"cuda", "triton"} & set(backends):
            entries = timed(case for case in cases if case.shape == cases[0].shape)
            assert entries[0]["asked"], f"{op}'s rule asks nothing"
            keys = [key for entry in entries for key, _ in entry["asked"]]
            assert len(keys) == len(set(keys)), f"two directions of {op} answer one question"


def test_direction_without_a_choice_counts_to_the_forward():
    common = {"op": "batch_norm_act", "shape": "64 ch"}
    entries = [
        {
            **common,
            "direction": "forward",
            "times": {"cuda": 10.0, "triton": 12.0},
            "asked": [["batch_norm_act x", [8]]],
        },
        {**common, "direction": "backward", "times": {"cuda": 30.0, "triton": 20.0}, "asked": []},
    ]
    (row,) = record.rows(entries)
    assert row == {"key": "batch_norm_act x", "sizes": [8], "best": "triton", "times": {"cuda": 40.0, "triton": 32.0}}


def test_directions_with_choices_of_their_own_stay_apart():
    common = {"op": "depthwise_conv2d", "shape": "64 ch"}
    entries = [
        {**common, "direction": direction, "times": times, "asked": [[f"depthwise_conv2d.{direction}", [8]]]}
        for direction, times in (("forward", {"cuda": 1.0, "library": 2.0}), ("backward_input", {"library": 3.0}))
    ]
    assert [(row["key"], row["best"]) for row in record.rows(entries)] == [
        ("depthwise_conv2d.backward_input", "library"),
        ("depthwise_conv2d.forward", "cuda"),
    ]


def test_backend_that_fails_in_one_direction_is_not_recorded():
    common = {"op": "batch_norm_act", "shape": "64 ch"}
    entries = [
        {**common, "direction": "forward", "times": {"cuda": 1.0, "triton": 2.0}, "asked": [["k", [1]]]},
        {**common, "direction": "backward", "times": {"triton": 2.0}, "asked": []},
    ]
    assert [row["best"] for row in record.rows(entries)] == ["triton"]


def test_cases_that_ask_the_same_are_answered_together():
    entries = [
        {"op": "prefix_pack", "shape": shape, "direction": "forward", "times": times, "asked": [["key", []]]}
        for shape, times in (("large", {"cuda": 40.0, "triton": 50.0}), ("small", {"cuda": 9.0, "triton": 8.0}))
    ]
    assert record.rows(entries) == [
        {"key": "key", "sizes": [], "best": "cuda", "times": {"cuda": 49.0, "triton": 58.0}}
    ]


def test_file_without_timings_is_refused():
    with pytest.raises(SystemExit, match="no timings"):
        record.table({"machine": {}, "stages": {}})
