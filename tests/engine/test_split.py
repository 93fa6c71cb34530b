"""The images of a search: never the held-out ones, never seen in training where a share is left out."""

from __future__ import annotations

import pytest
import torch

from fastslim.data import Augmented, make_loader, start_epoch
from fastslim.engine.build import build_data, load_all_data
from fastslim.engine.config import TrainConfig
from fastslim.engine.split import Part, search_part, split_indices
from fastslim.errors import FastslimValueError


def images_of(dataset: object) -> set[bytes]:
    return {dataset[i][0].numpy().tobytes() for i in range(len(dataset))}  # type: ignore[arg-type, index]


def test_search_training_and_held_out_images_are_apart(tiny: TrainConfig) -> None:
    whole, data = load_all_data(tiny), build_data(tiny.replace(search_share=0.25))
    search = images_of(search_part(whole, 0.25))
    train, held_out = images_of(data.train), images_of(data.val)
    assert len(search) == 12 and len(train) == 36
    assert not search & train and not search & held_out
    assert search | train == images_of(whole.train)
    assert images_of(data.calibration) == train


def test_the_split_depends_on_nothing_but_the_share(tiny: TrainConfig) -> None:
    parts = [
        images_of(build_data(tiny.replace(search_share=0.25, seed=seed, batch_size=batch)).train)
        for seed, batch in ((0, 16), (7, 4))
    ]
    assert parts[0] == parts[1]
    assert split_indices(1000, 0.1)[0] != list(range(100))


def test_without_a_share_the_search_sees_training_images(tiny: TrainConfig) -> None:
    whole = load_all_data(tiny)
    assert images_of(search_part(whole, 0.0)) == images_of(whole.train)


def test_a_part_keeps_the_augmentation_of_its_images() -> None:
    base = torch.utils.data.TensorDataset(torch.arange(8.0)[:, None], torch.arange(8))
    augmented = Augmented(base, lambda image, generator: image + torch.rand((), generator=generator), seed=3)
    part = Part(augmented, [1, 5, 6])
    loader = make_loader(part, 1, shuffle=True)
    start_epoch(loader, 4)
    seen = {int(label): float(image) for image, label in loader}
    augmented.set_epoch(4)
    assert seen == {i: float(augmented[i][0]) for i in (1, 5, 6)}


def test_a_share_without_an_image_is_refused(tiny: TrainConfig) -> None:
    with pytest.raises(FastslimValueError, match=r"search_share=0\.01: of 48 training images that is none; give at"):
        build_data(tiny.replace(search_share=0.01))
    with pytest.raises(FastslimValueError, match=r"search_share=0\.9: must be at most 0\.5"):
        tiny.replace(search_share=0.9)
