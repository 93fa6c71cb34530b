"""Image folders: reading, cropping, colours, and folders that can't be trained on."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastslim.data import ImageFolder, load_data
from fastslim.data.folder import MEAN, STD
from fastslim.errors import FastslimError, FastslimFileError, FastslimValueError


def save_image(path: Path, height: int = 12, width: int = 20, color: tuple[int, int, int] = (255, 0, 0)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), color).save(path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for part, count in (("train", 3), ("val", 2)):
        for index in range(count):
            save_image(tmp_path / part / "cat" / f"{index}.png", color=(255, 0, 0))
            save_image(tmp_path / part / "dog" / f"{index}.JPG", color=(0, 0, 255))
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    return tmp_path


def test_classes_are_folders_in_the_order_of_their_names(root: Path) -> None:
    data = load_data("folder", root=str(root), image_size=8, augment=False)
    assert (data.num_classes, data.image_shape, len(data.train), len(data.val)) == (2, (3, 8, 8), 6, 4)
    assert [data.val[i][1] for i in range(4)] == [0, 0, 1, 1]
    assert data.val.classes == ("cat", "dog")


def test_pixels_are_normalised_by_colour(root: Path) -> None:
    image, _ = ImageFolder(root / "train", 8)[0]
    expected = [(value - mean) / std for value, mean, std in zip((1, 0, 0), MEAN, STD, strict=True)]
    torch.testing.assert_close(image[:, 3, 3], torch.tensor(expected))


def test_central_square_is_kept(tmp_path: Path) -> None:
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = 255
    (tmp_path / "a").mkdir()
    Image.fromarray(pixels).save(tmp_path / "a" / "x.png")
    image, _ = ImageFolder(tmp_path, 10)[0]
    assert (image > 0).all()


def test_grayscale_has_one_channel(root: Path) -> None:
    data = load_data("folder", root=str(root), image_size=8, grayscale=True)
    assert data.image_shape == (1, 8, 8)


def test_augmented_images_keep_size_and_label(root: Path) -> None:
    data = load_data("folder", root=str(root), image_size=16, augment=True)
    assert data.train[5][0].shape == (3, 16, 16) and data.train[5][1] == 1
    assert data.calibration[5][0].shape == (3, 16, 16)


def refusal(**options: object) -> FastslimError:
    with pytest.raises(FastslimError) as caught:
        load_data("folder", image_size=8, **options)
    return caught.value


def test_missing_root_is_asked_for() -> None:
    error = refusal()
    assert isinstance(error, FastslimValueError)
    assert str(error) == "data 'folder' needs data_root, a folder that holds train/ and val/"


def test_missing_folder_is_named(tmp_path: Path, root: Path) -> None:
    error = refusal(root=str(tmp_path / "nowhere"))
    assert isinstance(error, FastslimFileError)
    assert "nowhere: data_root should hold train/ and val/" in str(error)
    (root / "val").rename(root / "test")
    assert re.search(
        r"there is no folder \S*val: it should hold one folder of images a class", str(refusal(root=str(root)))
    )


def test_folder_without_classes_is_named(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    assert "train holds no folders: put the images of each class into a folder there" in str(
        refusal(root=str(tmp_path))
    )


def test_folder_without_images_is_named(tmp_path: Path) -> None:
    (tmp_path / "train" / "cat").mkdir(parents=True)
    assert re.search(r"train holds no images \(\.bmp, .*\.png", str(refusal(root=str(tmp_path))))


def test_single_class_is_refused(tmp_path: Path) -> None:
    for part in ("train", "val"):
        save_image(tmp_path / part / "cat" / "0.png")
    assert "has 1 class: a classifier needs at least 2" in str(refusal(root=str(tmp_path)))


def test_class_in_one_part_only_is_named(root: Path) -> None:
    save_image(root / "train" / "mouse" / "0.png")
    assert "differ in their classes: 'mouse' is in one of them only" in str(refusal(root=str(root)))


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n\0\0"])
def test_unreadable_image_is_named(root: Path, content: bytes) -> None:
    broken = root / "train" / "cat" / "1.png"
    broken.write_bytes(content)
    dataset = ImageFolder(root / "train", 8)
    with pytest.raises(FastslimFileError, match=rf"{re.escape(str(broken))} cannot be read as an image .*remove it"):
        dataset[1]


def test_truncated_image_is_named(root: Path) -> None:
    broken = root / "train" / "cat" / "1.png"
    Image.fromarray(np.random.RandomState(0).randint(0, 255, (64, 64, 3), np.uint8)).save(broken)
    broken.write_bytes(broken.read_bytes()[:3000])
    with pytest.raises(FastslimFileError, match=r"1\.png cannot be read as an image"):
        ImageFolder(root / "train", 8)[1]
