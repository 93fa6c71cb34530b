"""`load_data` with functions of the user's, and everything such a function can get wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastslim.data import Augmented, load_data
from fastslim.errors import FastslimError, FastslimValueError

MODULE = """
import torch
from torch.utils.data import TensorDataset

def dataset(count=4, image=None, labels=None):
    images = torch.zeros(count, 1, 6, 5) if image is None else image
    return TensorDataset(images, torch.arange(count) % 3 if labels is None else labels)

class Unlabelled(TensorDataset):
    def __getitem__(self, index):
        return self.tensors[0][index]

def good(): return dataset(), dataset(2)
def good_list(): return [list(dataset()), list(dataset(2))]
def only_one(): return dataset()
def three(): return dataset(), dataset(), dataset()
def nothing(): return None
def empty(): return dataset(0), dataset()
def empty_val(): return dataset(), dataset(0)
def integers(): return dataset(image=torch.zeros(4, 1, 6, 5, dtype=torch.uint8)), dataset()
def flat(): return dataset(image=torch.zeros(4, 30)), dataset()
def soft_labels(): return dataset(labels=torch.rand(4, 3)), dataset()
def one_class(): return dataset(labels=torch.zeros(4, dtype=torch.long)), dataset()
def unlabelled(): return Unlabelled(torch.zeros(4, 1, 6, 5)), dataset()
def iterator(): return (item for item in dataset()), dataset()
def other_channels(): return dataset(), dataset(image=torch.zeros(4, 3, 6, 5))
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_data.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "own_data", raising=False)
    return "own_data"


def test_function_of_the_user_is_called(module: str) -> None:
    data = load_data(f"{module}:good")
    assert (len(data.train), len(data.val), data.num_classes, data.image_shape) == (4, 2, 3, (1, 6, 5))


def test_classes_are_asked_for_where_nothing_tells(module: str) -> None:
    with pytest.raises(FastslimValueError, match="does not tell how many classes it has: set num_classes"):
        load_data(f"{module}:good_list")
    assert load_data(f"{module}:good_list", num_classes=3).num_classes == 3


@pytest.mark.parametrize(
    ("function", "kind", "message"),
    [
        ("only_one", TypeError, "own_data:only_one must return (train, val) datasets, not a TensorDataset"),
        ("three", TypeError, "must return (train, val) datasets, not a tuple of 3"),
        ("nothing", TypeError, "must return (train, val) datasets, not a NoneType"),
        ("empty", ValueError, "the training data of 'own_data:empty' is empty"),
        ("empty_val", ValueError, "the held-out data of 'own_data:empty_val' is empty"),
        ("integers", TypeError, "are torch.uint8: convert them to float32"),
        ("flat", TypeError, "must be tensors (C, H, W), not a torch.float32 tensor of shape (30,)"),
        ("soft_labels", TypeError, "must be whole numbers, not a torch.float32 tensor of shape (3,)"),
        ("one_class", ValueError, "has 1 class: a classifier needs at least 2"),
        ("unlabelled", TypeError, "must be (image, label), not a torch.float32 tensor of shape (1, 6, 5)"),
        ("iterator", TypeError, "must be a dataset with a length and items, not a generator"),
        ("other_channels", ValueError, "training images have 1 channels, held-out ones 3"),
        ("god", ValueError, "'own_data' has no function 'god': did you mean 'good'?"),
    ],
)
def test_wrong_function_is_explained(module: str, function: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(FastslimError) as caught:
        load_data(f"{module}:{function}")
    assert isinstance(caught.value, kind)
    assert message in str(caught.value)


def test_missing_module_is_named() -> None:
    with pytest.raises(FastslimValueError, match="'no_such_module:f': cannot import 'no_such_module'"):
        load_data("no_such_module:f")


def test_unknown_name_gives_the_nearest() -> None:
    with pytest.raises(FastslimValueError, match="there is no data 'digit': did you mean 'digits'"):
        load_data("digit")


def test_digits_are_shifted_for_training_alone() -> None:
    data = load_data("digits", augment=True)
    assert isinstance(data.train, Augmented) and not isinstance(data.calibration, Augmented)
    assert (data.num_classes, data.image_shape) == (10, (1, 8, 8))
    changed = sum(not torch.equal(data.train[i][0], data.calibration[i][0]) for i in range(100))
    assert changed == 100
    plain = load_data("digits", augment=False)
    assert all(torch.equal(plain.train[i][0], plain.calibration[i][0]) for i in range(100))
