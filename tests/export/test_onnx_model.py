"""ONNX models: as good as the network in onnxruntime on every batch size, one file, as small as the subnet."""

import os
import sys

import pytest
import torch
from torch import nn
from trained_nets import NETS, shared

import fastslim
from fastslim.export import export_onnx, export_subnet

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
runtime = pytest.importorskip("onnxruntime")


@pytest.mark.parametrize("name", NETS)
def test_a_model_equals_its_network_on_every_batch_size(name, tmp_path):
    net = shared(name)
    plain = export_subnet(net.algo, net.half, fold_batch_norm=name == "mobilenet_v2")
    report = export_onnx(tmp_path / "half.onnx", plain, net.images)
    assert report.batch_sizes == (64, 1, 2, 7)
    assert report.equality.relative <= (1e-4 if name == "mobilenet_v2" else 1e-5)
    assert os.listdir(tmp_path) == ["half.onnx"]
    assert report.size == os.path.getsize(tmp_path / "half.onnx")
    model = onnx.load(tmp_path / "half.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert [dim.dim_param or dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim] == [
        "batch", 1, 8, 8,
    ]  # fmt: skip


def test_a_folded_model_of_a_fixed_batch_and_opset(tmp_path):
    net = shared("concat")
    plain = export_subnet(net.algo, net.half, fold_batch_norm=True)
    report = export_onnx(tmp_path / "half.onnx", plain, net.images[:3], dynamic_batch=False, opset=18)
    assert report.equality.relative <= 1e-5
    model = onnx.load(tmp_path / "half.onnx")
    assert {entry.domain: entry.version for entry in model.opset_import}[""] == 18
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 3


class Several(nn.Module):
    """Tensors by position and by name, a constant, and two outputs of which one has no batch."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(5, 4)

    def forward(self, left, right, scale=1.0, *, more):
        return {"sum": self.first(left) * scale + self.second(right), "weight": self.first.weight * more.sum()}


def test_inputs_are_called_after_the_arguments(tmp_path):
    inputs = {"more": torch.randn(1, 1), "right": torch.randn(4, 5), "left": torch.randn(4, 3), "scale": 2.0}
    report = export_onnx(tmp_path / "several.onnx", Several(), inputs)
    assert report.equality.relative < 1e-6
    session = runtime.InferenceSession(tmp_path / "several.onnx")
    assert [(value.name, value.shape[0]) for value in session.get_inputs()] == [
        ("left", "batch"), ("right", "batch"), ("more", 1),
    ]  # fmt: skip


def test_the_file_is_as_small_as_the_subnet(tmp_path):
    net = shared("resnet18")
    sizes, numbers = [], []
    for ratio in (1.0, 0.5):
        plain = export_subnet(net.algo, net.subnets[ratio], fold_batch_norm=True)
        sizes.append(export_onnx(tmp_path / f"{ratio}.onnx", plain, net.images).size)
        numbers.append(sum(t.numel() * t.element_size() for t in plain.state_dict().values()))
    assert numbers[0] - numbers[1] > 1e6
    assert abs((sizes[0] - sizes[1]) / (numbers[0] - numbers[1]) - 1) < 0.01


def test_a_wrong_model_is_not_written(tmp_path, monkeypatch):
    real = torch.onnx.export
    wrong = torch.export.export(nn.Linear(3, 2), (torch.ones(2, 3),))
    monkeypatch.setattr(torch.onnx, "export", lambda program, **options: real(wrong, **options))
    with pytest.raises(fastslim.FastslimError, match="the ONNX model, on a batch of 2, computes something else"):
        export_onnx(tmp_path / "x.onnx", nn.Linear(3, 2), torch.ones(2, 3), dynamic_batch=False)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("opset", [11, 99])
def test_an_opset_that_cannot_be_written_is_told(opset, tmp_path):
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU())
    with pytest.raises(fastslim.FastslimError, match=f"cannot write Sequential with opset {opset}, only with 18"):
        export_onnx(tmp_path / "x.onnx", net, torch.ones(2, 1, 5, 5), opset=opset)
    assert not os.listdir(tmp_path)


def test_a_type_that_the_runtime_cannot_run_is_told(tmp_path):
    with pytest.raises(fastslim.FastslimError, match=r"onnxruntime cannot run Conv2d .*export module.float\(\)"):
        export_onnx(tmp_path / "x.onnx", nn.Conv2d(1, 2, 3).double(), torch.ones(2, 1, 5, 5))
    assert not os.listdir(tmp_path)


def test_an_operator_without_a_counterpart_is_told(tmp_path):
    class Unusual(nn.Module):
        def forward(self, x):
            return torch.linalg.eigvals(x).real

    with pytest.raises(fastslim.FastslimError, match=r"torch.onnx cannot take Unusual.*export_torch"):
        export_onnx(tmp_path / "x.onnx", Unusual(), torch.eye(3)[None].repeat(2, 1, 1))


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named_with_its_command(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(fastslim.FastslimError, match=rf"needs the package {package}: pip install 'fastslim\[onnx\]'"):
        export_onnx(tmp_path / "x.onnx", nn.Linear(3, 2), torch.ones(2, 3))


def test_more_weights_than_a_file_holds_are_refused(tmp_path):
    huge = nn.Module()
    huge.register_buffer("weight", torch.empty(2**29 + 1, device="meta"))
    with pytest.raises(fastslim.FastslimError, match=r"2.00 GiB of weights.*use export_torch"):
        export_onnx(tmp_path / "x.onnx", huge, torch.ones(2, 3))
