"""Configurations: YAML in and out, wrong keys, types and values, and what a hostile file can't do."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from fastslim.engine.config import SHIPPED, TrainConfig, find_config, load_config
from fastslim.errors import FastslimError, FastslimFileError, FastslimTypeError, FastslimValueError


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def test_saved_configuration_reads_back_equal(tmp_path: Path) -> None:
    config = TrainConfig(
        lr=1e-3, choices=(0.3, 1.0), exclude=("head.*",), data_root="a b: c", num_classes=4, augment=False
    )
    config.save(tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]


def test_flags_override_the_file(tmp_path: Path) -> None:
    config = load_config(written(tmp_path, "epochs: 7\nseed: 3\n"), epochs=2, choices=["0.5", "1"])
    assert (config.epochs, config.seed, config.choices) == (2, 3, (0.5, 1.0))


def test_yaml_writes_small_numbers_without_a_dot(tmp_path: Path) -> None:
    assert load_config(written(tmp_path, "lr: 1e-3\nweight_decay: 5e-4")).lr == 0.001


def test_empty_file_means_the_defaults(tmp_path: Path) -> None:
    assert load_config(written(tmp_path, "# nothing\n")) == TrainConfig()


def test_every_option_explains_itself() -> None:
    for entry in dataclasses.fields(TrainConfig):
        assert len(entry.metadata["help"]) > 8, entry.name


@pytest.mark.parametrize("name", [p.stem for p in SHIPPED.glob("*.yaml")])
def test_shipped_configurations_load(name: str) -> None:
    assert isinstance(load_config(name), TrainConfig)


def test_file_in_the_current_folder_goes_before_a_shipped_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_config("digits") == SHIPPED / "digits.yaml"
    Path("digits").write_text("epochs: 5")
    assert load_config("digits").epochs == 5


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("epoch: 3", FastslimValueError, "unknown key 'epoch' in {path}: did you mean 'epochs'?"),
        ("zzz: 3", FastslimValueError, "unknown key 'zzz' in {path}: known: accumulate, augment"),
        ("epochs: ten", FastslimTypeError, "epochs must be a whole number, not 'ten' (str)"),
        ("epochs: 2.5", FastslimTypeError, "epochs must be a whole number, not 2.5 (float)"),
        ("epochs: yes", FastslimTypeError, "epochs must be a whole number, not True (bool)"),
        ("epochs:", FastslimTypeError, "epochs must be a whole number, not None (NoneType)"),
        ("lr: fast", FastslimTypeError, "lr must be a number, not 'fast' (str)"),
        ("lr: .nan", FastslimTypeError, "lr must be a number, not nan (float)"),
        ("augment: 1", FastslimTypeError, "augment must be true or false, not 1 (int)"),
        ("model: 18", FastslimTypeError, "model must be a string, not 18 (int)"),
        ("choices: [0.5, wide]", FastslimTypeError, "choices must be a number, not 'wide' (str)"),
        ("optimizer: sdg", FastslimValueError, "optimizer: 'sdg' is not possible: did you mean 'sgd'?"),
        ("batch_size: 1", FastslimValueError, "batch_size=1: must be at least 2"),
        ("lr: 0", FastslimValueError, "lr=0.0: must be above 0"),
        ("ema_decay: 1", FastslimValueError, "ema_decay=1.0: must be below 1"),
        ("epochs: 3\nwarmup_epochs: 5", FastslimValueError, "warmup_epochs=5.0 must be below epochs=3"),
        ("choices: [0.25, 0.5]", FastslimValueError, "choices=[0.25, 0.5]: must be ratios above 0 and up to 1, with"),
        ("choices: [8, 16]", FastslimValueError, "choices=[8.0, 16.0]: must be ratios above 0 and up to 1"),
        ("choices: []", FastslimValueError, "choices=[]: must be ratios"),
        ("- epochs", FastslimValueError, "{path} must hold 'key: value' lines, not a list"),
        ("a: b: c", FastslimValueError, "{path} (line 1) is not plain YAML: mapping values are not allowed here"),
        ("lr: 0.1\nmodel: 'x", FastslimValueError, "{path} (line 2) is not plain YAML: found unexpected end of stream"),
    ],
)  # fmt: skip
def test_wrong_file_is_explained(tmp_path: Path, text: str, kind: type[FastslimError], message: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(kind) as caught:
        load_config(path)
    assert str(caught.value).startswith(message.format(path=path))


def test_no_tag_builds_an_object(tmp_path: Path) -> None:
    victim = tmp_path / "made_by_yaml"
    path = written(tmp_path, f"model: !!python/object/apply:os.mkdir ['{victim}']")
    with pytest.raises(FastslimValueError, match="is not plain YAML: could not determine a constructor for the tag"):
        load_config(path)
    assert not victim.exists()


def test_missing_file_names_the_shipped_ones() -> None:
    with pytest.raises(
        FastslimFileError, match="no configuration file digit, and none ships as 'digit': did you mean 'digits'"
    ):
        load_config("digit")


def test_binary_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(FastslimFileError, match=r"weights\.pt cannot be read"):
        load_config(path)
