"""A run's export: every format holds the supernet's outputs, and folders that are used already are safe."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastslim.algorithms.calibrate import calibrate_batch_norm
from fastslim.engine import export_run as module
from fastslim.engine.config import TrainConfig
from fastslim.engine.export_run import export_run, format_bytes, format_files
from fastslim.engine.run import calibration_loader, evaluate_run, load_run, train
from fastslim.engine.search_run import search_run
from fastslim.engine.stage_options import ExportOptions, SearchOptions
from fastslim.errors import FastslimFileError, FastslimValueError
from fastslim.export import load_slimmable, load_subnet

WIDTHS = ExportOptions(width=(0.5, 1.0))


def test_every_format_computes_what_the_supernet_does(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "product"
    outcome = export_run(trained, WIDTHS.replace(format=["subnet", "pt2", "onnx", "slimmable"], out=str(out)))
    config, data, algo = load_run(trained)
    half = algo.uniform_subnet(0.5)
    calibrate_batch_norm(algo, calibration_loader(config, data), [half], config.calibration_batches)
    algo.eval().set_subnet(half)
    images = torch.stack([data.val[i][0] for i in range(24)])
    expected = algo(images).detach()
    onnxruntime = pytest.importorskip("onnxruntime")
    slimmable = load_slimmable(out / "slimmable.safetensors", __import__("tiny_run").build(3, 1))
    slimmable.set_width("width-0.5")
    got = {
        "subnet": load_subnet(out / "width-0.5", algo)(images).detach(),
        "pt2": torch.export.load(out / "width-0.5.pt2").module()(images).detach(),
        "onnx": torch.tensor(
            onnxruntime.InferenceSession(out / "width-0.5.onnx").run(None, {"input": images.numpy()})[0]
        ),
        "slimmable": slimmable(images).detach(),
    }
    for name, logits in got.items():
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5, msg=name)
    assert {file.path for file in outcome.files} | {"export.json"} == {path.name for path in out.iterdir()}
    for file in outcome.files:
        path = out / file.path
        parts = path.iterdir() if path.is_dir() else [path]
        assert file.bytes == sum(part.stat().st_size for part in parts)
        assert 0 <= file.difference <= file.tolerance * file.scale
    accuracy = {row.name: row.accuracy for row in outcome.subnets}
    assert accuracy == {f"width-{row.width:g}": row.accuracy for row in evaluate_run(trained, widths=[0.5, 1.0])}
    assert load_subnet(out / "width-0.5").metrics["accuracy"] == accuracy["width-0.5"]
    assert "slimmable.safetensors" in format_files(outcome)


def test_what_the_search_found_is_exported_where_nothing_is_named(trained: Path) -> None:
    with pytest.raises(
        FastslimValueError, match=r"which subnet\? `fastslim search \S+` has found none yet; give --width"
    ):
        export_run(trained, ExportOptions())
    search_run(trained, SearchOptions(budget={"flops": [0.5, 0.25]}, score="loss"), progress=False)
    outcome = export_run(trained, ExportOptions())
    assert outcome.folder == trained / "export"
    assert [file.path for file in outcome.files] == ["flops-0.5", "flops-0.25"]


def test_folded_batch_norms_change_no_output(trained: Path) -> None:
    options = WIDTHS.replace(format=["pt2"], fold_batch_norm=True)
    outcome = export_run(trained, options)
    program = torch.export.load(outcome.folder / "width-0.5.pt2")
    assert not any("batch_norm" in str(node.target) for node in program.graph.nodes)
    assert all(file.difference <= 1e-5 * file.scale for file in outcome.files)


def test_finished_export_is_not_written_again(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = export_run(trained, WIDTHS)
    with monkeypatch.context() as patch:
        patch.setattr(module, "load_run", lambda *_, **__: pytest.fail("a finished export was begun again"))
        again = export_run(trained, WIDTHS)
    assert (again.status, again.files, again.subnets) == ("finished before", first.files, first.subnets)
    with pytest.raises(
        FastslimValueError, match=r"with other options \(width: .*\): choose another --out, or replace it"
    ):
        export_run(trained, ExportOptions(width=(0.25,)))
    assert export_run(trained, ExportOptions(width=(0.25,)), overwrite=True).status == "exported"


def test_a_folder_of_someone_else_is_not_written_into(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("precious")
    with pytest.raises(
        FastslimFileError, match=r"exists already and holds no export .*: choose another --out, or replace"
    ):
        export_run(trained, WIDTHS.replace(out=str(tmp_path / "out")))
    (tmp_path / "file").write_text("precious")
    with pytest.raises(FastslimFileError, match="exists already and holds no export"):
        export_run(trained, WIDTHS.replace(out=str(tmp_path / "file")))
    export_run(trained, WIDTHS.replace(out=str(tmp_path / "out")), overwrite=True)
    assert (tmp_path / "out" / "notes.txt").read_text() == "precious"


def test_export_that_was_killed_is_made_again(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(module, "export_torch", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            export_run(trained, WIDTHS.replace(format=["subnet", "pt2"]))
    assert export_run(trained, WIDTHS.replace(format=["subnet", "pt2"])).status == "exported"


def test_a_changed_supernet_is_noticed(trained: Path, tiny: TrainConfig) -> None:
    export_run(trained, WIDTHS)
    train(tiny.replace(epochs=1, warmup_epochs=0), trained, overwrite=True)
    with pytest.raises(FastslimValueError, match="the supernet or the subnets have changed since"):
        export_run(trained, WIDTHS)


def test_two_subnets_of_one_name_and_foreign_weights_are_refused(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(FastslimValueError, match="two subnets are called 'width-0.5'"):
        export_run(trained, ExportOptions(width=(0.5, 0.5)))
    export_run(trained, WIDTHS)
    mine = str(trained / "export" / "width-0.5")
    with pytest.raises(
        FastslimValueError, match=r"width-0\.5 has weights of its own, and a slimmable file holds those"
    ):
        export_run(trained, ExportOptions(subnet=(mine,), format=("slimmable",), out=str(tmp_path / "other")))
    again = export_run(trained, ExportOptions(subnet=(mine,), out=str(tmp_path / "other")))
    ours, theirs = (load_subnet(path).state_dict() for path in (mine, tmp_path / "other" / "width-0.5"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert again.subnets[0].accuracy == load_subnet(mine).metrics["accuracy"]


def test_images_of_a_folder_come_with_their_normalisation() -> None:
    assert module.normalisation_of(TrainConfig()) is None
    grey = module.normalisation_of(TrainConfig(data="folder", grayscale=True, image_size=32))
    assert grey is not None and json.loads(json.dumps(grey))["image_size"] == 32 and len(grey["mean"]) == 1


@pytest.mark.parametrize(("size", "text"), [(12, "12 B"), (1234, "1.23 kB"), (1_234_567, "1.23 MB"), (5e9, "5 GB")])
def test_sizes_have_three_digits(size: int, text: str) -> None:
    assert format_bytes(size) == text
