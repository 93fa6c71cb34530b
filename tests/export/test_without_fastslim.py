"""Every format runs on a machine that has no fastslim."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from trained_nets import trained

from fastslim.export import export_onnx, export_subnet, export_torch, save_subnet

pytest.importorskip("safetensors")
pytest.importorskip("onnxruntime")

CODE = """
import json, sys
import onnxruntime, torch
from safetensors.torch import load_file
from torch import nn
sys.modules["fastslim"] = None
images, expected = torch.load("data.pt")

program = torch.export.load("half.pt2").module()
torch.testing.assert_close(program(images), expected, rtol=1e-4, atol=1e-5)

model = onnxruntime.InferenceSession("half.onnx")
output, = model.run(None, {"x": images.numpy()})
torch.testing.assert_close(torch.from_numpy(output), expected, rtol=1e-4, atol=1e-5)

description = json.load(open("half/subnet.json"))
layers = description["layers"]
first, norm, last = (layers[name]["weights"]["weight"] for name in ("first", "norm", "last"))
state = load_file("half/" + description["weights"])
x = nn.functional.conv2d(images, state["first.weight"].reshape(first), state["first.bias"], padding=1)
norm = nn.BatchNorm2d(*norm).eval()
norm.load_state_dict({k.partition(".")[2]: v for k, v in state.items() if k.startswith("norm.")})
x = (norm(x) * state["scaled.scale"]).relu().mean((2, 3))
output = nn.functional.linear(x, state["last.weight"].reshape(last), state["last.bias"])
torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
"""


def test_every_format_runs_without_fastslim(tmp_path):
    net = trained("rewritten")
    plain = export_subnet(net.algo, net.half)
    torch.save((net.images, plain(net.images).detach()), tmp_path / "data.pt")
    export_torch(tmp_path / "half.pt2", plain, net.images)
    export_onnx(tmp_path / "half.onnx", plain, net.images)
    save_subnet(tmp_path / "half", net.algo, net.half)
    assert isinstance(plain, nn.Module)
    subprocess.run([sys.executable, "-c", CODE], check=True, cwd=tmp_path)
