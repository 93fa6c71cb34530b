"""A subnet in a folder: what it holds, whom it fits, and what damages are noticed."""

import json
import os

import pytest
import torch
from torch import nn
from trained_nets import NETS, shared

import fastslim
from fastslim.export import export_subnet, load_subnet, save_subnet, subnet_file

safetensors = pytest.importorskip("safetensors.torch")


@pytest.fixture
def saved(tmp_path):
    net = shared("concat")
    return save_subnet(tmp_path / "half", net.algo, net.half, metrics={"accuracy": 0.9})


@pytest.mark.parametrize("name", NETS)
def test_it_loads_into_a_freshly_built_network(name, tmp_path):
    net = shared(name, torch.float64)
    save_subnet(tmp_path / "half", net.algo, net.half)
    plain = export_subnet(net.algo, net.half)
    fresh = net.build().float()
    before = {key: value.clone() for key, value in fresh.state_dict().items()}
    loaded = load_subnet(tmp_path / "half", fresh)
    assert torch.equal(loaded(net.images), plain(net.images))
    assert not loaded.training
    assert all(torch.equal(value, before[key]) for key, value in fresh.state_dict().items())
    assert not any(type(m).__module__.startswith("fastslim.nn") for m in loaded.modules())


@pytest.mark.parametrize("kind", ["algorithm", "mutator", "converted", "plain network of that size"])
def test_it_loads_into_every_form_of_the_network(kind, tmp_path):
    net = shared("concat")
    save_subnet(tmp_path / "half", net.algo, net.half)
    plain = export_subnet(net.algo, net.half)
    if kind == "converted":
        model = net.build()
        fastslim.convert(model, net.images, divisor=1, choices=[0.25, 0.5, 1])
    else:
        model = {"algorithm": net.algo, "mutator": net.algo.mutator}.get(kind, plain)
    assert torch.equal(load_subnet(tmp_path / "half", model)(net.images), plain(net.images))


def test_it_loads_as_choices(saved):
    net = shared("concat")
    choices = load_subnet(saved.path)
    assert choices == net.half == saved
    net.algo.set_subnet(choices)
    net.algo.set_max_subnet()


def test_the_description_tells_sizes_costs_and_versions(saved):
    net = shared("concat")
    found = json.loads((saved.path / "subnet.json").read_text())
    cost = net.algo.subnet_cost(net.half)
    assert found["costs"] == {"flops": cost.multiply_adds, "parameters": cost.parameters} == saved.costs
    assert found["full_costs"]["parameters"] == sum(p.numel() for p in net.algo.architecture.parameters())
    assert found["layers"]["left"]["weights"] == {"weight": [8, 8, 3, 3], "bias": [8]}
    assert found["layers"]["join"]["in_channels"] == 8 + 12 + 8
    assert found["inputs"] == {"images": {"shape": [2, 1, 8, 8], "dtype": "float32"}}
    assert found["versions"]["torch"] == torch.__version__
    assert found["metrics"] == {"accuracy": 0.9}


def test_the_weights_file_is_as_small_as_the_subnet(tmp_path):
    net = shared("resnet18")
    sizes, numbers = [], []
    for ratio in (1.0, 0.5):
        saved = save_subnet(tmp_path / str(ratio), net.algo, net.subnets[ratio])
        sizes.append((saved.path / "weights.safetensors").stat().st_size)
        numbers.append(sum(t.numel() * t.element_size() for t in saved.state_dict().values()))
    assert numbers[1] < 0.3 * numbers[0]
    assert abs((sizes[0] - sizes[1]) - (numbers[0] - numbers[1])) < 500  # the header names other shapes


def test_tied_weights_are_written_once_and_stay_tied(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 11, bias=False))
    model[1].weight = model[0].weight
    save_subnet(tmp_path / "tied", model)
    assert list(safetensors.load_file(tmp_path / "tied" / "weights.safetensors")) == ["0.weight"]
    other = nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 11, bias=False))
    other[1].weight = other[0].weight
    loaded = load_subnet(tmp_path / "tied", other)
    assert loaded[1].weight is loaded[0].weight
    assert torch.equal(loaded[0].weight, model[0].weight)


def test_a_network_trained_further_keeps_its_units(tmp_path):
    net = shared("concat")
    plain = export_subnet(net.algo, net.half)
    with torch.no_grad():
        plain.head.bias += 1
    save_subnet(tmp_path / "tuned", net.algo, net.half, module=plain)
    assert torch.equal(load_subnet(tmp_path / "tuned", net.build()).head.bias, plain.head.bias)
    save_subnet(tmp_path / "plain", plain, net.half, example_inputs=net.images)
    loaded = load_subnet(tmp_path / "plain", net.build())
    assert torch.equal(loaded(net.images), plain.eval()(net.images))
    assert load_subnet(tmp_path / "plain").costs == load_subnet(tmp_path / "tuned").costs
    with pytest.raises(fastslim.FastslimError, match="at this subnet it is"):
        save_subnet(tmp_path / "wrong", net.algo, net.subnets[0.25], module=plain)
    assert not (tmp_path / "wrong").exists()


def test_a_folded_network_loads_into_the_one_with_batch_norms(tmp_path):
    net = shared("resnet18")
    folded = export_subnet(net.algo, net.half, fold_batch_norm=True)
    save_subnet(tmp_path / "folded", net.algo, net.half, module=folded)
    loaded = load_subnet(tmp_path / "folded", net.build())
    assert torch.equal(loaded(net.images), folded(net.images))


def test_an_existing_subnet_is_kept_unless_told(saved):
    net = shared("concat")
    with pytest.raises(fastslim.FastslimError, match="exists already.*overwrite=True"):
        save_subnet(saved.path, net.algo, net.subnets[1.0])
    assert load_subnet(saved.path) == net.half
    for ratio in (1.0, 0.25, 1.0):
        save_subnet(saved.path, net.algo, net.subnets[ratio], overwrite=True)
        assert load_subnet(saved.path) == net.subnets[ratio]
        load_subnet(saved.path, net.build())
        assert len(list(saved.path.iterdir())) == 2


def test_an_interrupted_overwrite_leaves_the_old_subnet(saved, monkeypatch):
    net = shared("concat")
    old = load_subnet(saved.path, net.build())(net.images)

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(subnet_file, "replace_text", stop)
    with pytest.raises(KeyboardInterrupt):
        save_subnet(saved.path, net.algo, net.subnets[1.0], overwrite=True)
    monkeypatch.undo()
    assert torch.equal(load_subnet(saved.path, net.build())(net.images), old)


def test_an_interrupted_save_leaves_nothing(tmp_path, monkeypatch):
    net = shared("concat")

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(subnet_file, "_as_text", stop)
    with pytest.raises(KeyboardInterrupt):
        save_subnet(tmp_path / "half", net.algo, net.half)
    assert not os.listdir(tmp_path)


def test_a_foreign_folder_is_neither_read_nor_replaced(tmp_path):
    net = shared("concat")
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(fastslim.FastslimError, match="is not a subnet: fastslim.save_subnet writes a folder"):
        load_subnet(tmp_path)
    with pytest.raises(fastslim.FastslimError, match="is not a subnet"):
        save_subnet(tmp_path, net.algo, net.half, overwrite=True)
    with pytest.raises(fastslim.FastslimError, match="there is no subnet"):
        load_subnet(tmp_path / "nowhere")
    assert os.listdir(tmp_path) == ["thesis.tex"]


@pytest.mark.parametrize("damage", ["one byte", "cut", "no file", "foreign"])
def test_damaged_weights_are_noticed(saved, damage):
    file = saved.path / "weights.safetensors"
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    if damage == "no file":
        file.unlink()
    elif damage == "foreign":
        safetensors.save_file({"x": torch.zeros(3)}, file)
    else:
        file.write_bytes(data if damage == "one byte" else data[:-50])
    with pytest.raises(fastslim.FastslimError, match=r"damaged|there is no file|not written by fastslim"):
        load_subnet(saved.path, shared("concat").build())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is damaged"),
        ("[]", "its format is None"),
        ('{"format": "fastslim-subnet-2"}', "fastslim-subnet-2"),
        ('{"format": "fastslim-subnet-1"}', "it lacks"),
    ],
)
def test_a_damaged_description_is_noticed(saved, text, message):
    (saved.path / "subnet.json").write_text(text)
    with pytest.raises(fastslim.FastslimError, match=message):
        load_subnet(saved.path)


def test_a_weights_file_elsewhere_is_never_read(saved):
    file = saved.path / "subnet.json"
    file.write_text(file.read_text().replace('"weights.safetensors"', '"../weights.safetensors"'))
    with pytest.raises(fastslim.FastslimError, match="a name of weights"):
        load_subnet(saved.path)


def test_another_network_is_told_apart_by_its_units(saved):
    wide = shared("concat").build()
    wide.right, wide.join = nn.Conv2d(16, 40, 1), nn.Conv2d(72, 32, 1)
    with pytest.raises(fastslim.FastslimError, match=r"the file has no unit 'right_\(0, 40\)_40'"):
        load_subnet(saved.path, wide)
    with pytest.raises(
        fastslim.FastslimError, match=r"this network has no unit 'stem_\(0, 16\)_16'.*differences in all"
    ):
        load_subnet(saved.path, shared("resnet18").algo)


def test_another_number_of_classes_is_told(saved):
    other = shared("concat").build()
    other.head = nn.Linear(32, 7)
    with pytest.raises(fastslim.FastslimError, match="subnet of another network.*head"):
        load_subnet(saved.path, other)


def test_channel_counts_of_a_unit_are_compared(saved):
    file = saved.path / "subnet.json"
    found = json.loads(file.read_text())
    found["units"]["stem_(0, 16)_16"]["channels"] = 32
    file.write_text(json.dumps(found))
    with pytest.raises(fastslim.FastslimError, match=r"has 32 channels in the file, 16 in this network"):
        load_subnet(saved.path, shared("concat").algo)


def test_a_plain_networks_file_wants_its_inputs(tmp_path):
    net = shared("concat")
    save_subnet(tmp_path / "plain", export_subnet(net.algo, net.half), net.half)
    with pytest.raises(fastslim.FastslimError, match="pass example_inputs"):
        load_subnet(tmp_path / "plain", net.build())
    load_subnet(tmp_path / "plain", net.build(), example_inputs=net.images)


def test_a_missing_package_is_named_with_its_command(saved, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "safetensors", None)
    with pytest.raises(fastslim.FastslimError, match=r"pip install 'fastslim\[export\]'"):
        saved.state_dict()
    assert load_subnet(saved.path) == saved  # choices need none


def test_metrics_must_be_plain_values(tmp_path):
    net = shared("concat")
    with pytest.raises(fastslim.FastslimError, match=r"metrics\['model'\] is a Linear"):
        save_subnet(tmp_path / "x", net.algo, net.half, metrics={"model": nn.Linear(1, 1)})
    assert not (tmp_path / "x").exists()


def test_something_else_is_refused(tmp_path):
    with pytest.raises(fastslim.FastslimError, match="save_subnet takes"):
        save_subnet(tmp_path / "x", {"weight": torch.zeros(3)})
    save_subnet(tmp_path / "y", nn.Linear(2, 3))
    with pytest.raises(fastslim.FastslimError, match="model must be a network or a supernet, got str"):
        load_subnet(tmp_path / "y", "resnet18")
