"""Runner trains, validates, saves, resumes and searches from a config; the digits are learned."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmengine.runner.checkpoint import CheckpointLoader
from mmengine_toys import DISTILLER, MUTATOR, forget_runs, start

import fastslim
from fastslim import errors

LEARNED = 80.0  # per cent; ten classes, so weights that have learned nothing are right for about ten


@pytest.fixture(autouse=True)
def _no_run_of_another_test() -> Iterator[None]:
    torch.set_num_threads(1)
    forget_runs()
    yield
    forget_runs()


def config(**changes: Any) -> Config:
    """The issue's config for the digits: AutoSlim on a network of two convolutions, two epochs."""
    settings: dict[str, Any] = dict(
        custom_imports=dict(imports=["fastslim.integrations.mmengine"], allow_failed_imports=False),
        model=dict(
            type="fastslim.AutoSlim",
            architecture=dict(type="ModeToy", width=16),
            mutator=MUTATOR,
            distiller=DISTILLER,
            data_preprocessor=None,
            init_cfg=None,
            num_samples=2,
        ),
        optim_wrapper=dict(
            type="OptimWrapper", optimizer=dict(type="SGD", lr=0.3, momentum=0.9), accumulative_counts=4
        ),
        train_cfg=dict(by_epoch=True, max_epochs=4),
        val_cfg=dict(type="fastslim.SubnetValLoop", calibrate_sample_num=2000),
        test_cfg=dict(type="fastslim.SubnetValLoop", calibrate_sample_num=2000),
        default_hooks=dict(checkpoint=dict(type="CheckpointHook", interval=1)),
        randomness=dict(seed=0),
    )
    for part in ("train", "val", "test"):
        settings[f"{part}_dataloader"] = dict(
            batch_size=64,
            num_workers=0,
            sampler=dict(type="DefaultSampler", shuffle=part == "train", seed=0),
            dataset=dict(type="fastslim.Digits", train=part == "train"),
        )
    for part in ("val", "test"):
        settings[f"{part}_evaluator"] = dict(type="fastslim.Accuracy")
    return Config({**settings, **changes})


class Recorded(Hook):
    """What a run has drawn and measured."""

    def __init__(self) -> None:
        self.widths: list[Any] = []
        self.metrics: list[dict[str, float]] = []
        self.losses: list[dict[str, float]] = []

    def before_train(self, runner: Runner) -> None:
        draw = runner.model.sample_subnet

        def recorded() -> dict[str, int]:
            self.widths.append(draw())
            return self.widths[-1]

        runner.model.__dict__["sample_subnet"] = recorded

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self.losses.append({name: float(value) for name, value in outputs.items()})

    def after_val_epoch(self, runner: Runner, metrics: Any = None) -> None:
        self.metrics.append(dict(metrics))


def train(settings: Config, work_dir: Path, name: str) -> tuple[Runner, Recorded]:
    runner, hook = start(settings, work_dir, name), Recorded()
    runner.register_hook(hook)
    runner.train()
    return runner, hook


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor], Recorded]:
    """Four epochs without a stop."""
    forget_runs()
    folder = tmp_path_factory.mktemp("trained")
    random.seed(0)
    runner, hook = train(config(), folder, "trained")
    forget_runs()
    return folder, runner.model.state_dict(), hook


def test_the_digits_are_learned_at_every_width(trained: Any) -> None:
    _, _, hook = trained
    assert len(hook.metrics) == 4
    last = hook.metrics[-1]
    names = ["max_subnet", "min_subnet", "random_subnet_0", "random_subnet_1"]
    assert [last[f"{name}.accuracy/top1"] > LEARNED for name in names] == [True] * 4
    assert last["min_subnet.flops"] < last["random_subnet_1.flops"] < last["max_subnet.flops"]
    assert list(hook.losses[0]) == [
        "max_subnet.loss",
        "min_subnet.loss_kl",
        "random_subnet_0.loss_kl",
        "random_subnet_1.loss_kl",
    ]


def test_a_resumed_run_draws_the_same_widths_and_ends_with_the_same_weights(trained: Any, tmp_path: Path) -> None:
    _, expected, whole = trained
    _, first = train(config(train_cfg=dict(by_epoch=True, max_epochs=2)), tmp_path, "first")
    forget_runs()
    # A new process would have another seed; all that matters is in the checkpoint.
    runner, second = train(config(resume=True, randomness=dict(seed=7)), tmp_path, "second")
    assert runner.epoch == 4
    assert first.widths + second.widths == whole.widths
    assert first.widths != second.widths
    assert first.losses + second.losses == whole.losses
    assert second.metrics == whole.metrics[2:]
    state = runner.model.state_dict()
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(state[key], value), key


def test_the_wrapper_of_a_resumed_run_counts_on(trained: Any) -> None:
    folder, _, whole = trained
    runner = start(config(resume=True, train_cfg=dict(by_epoch=True, max_epochs=5)), folder, "on")
    runner.train()
    passes = 4 * len(whole.losses) // 4 * 5
    assert runner.optim_wrapper._inner_count == runner.optim_wrapper._max_counts == passes
    (folder / "epoch_5.pth").unlink()
    (folder / "last_checkpoint").write_text(str(folder / "epoch_4.pth"))


@pytest.mark.parametrize("scope", ["fastslim", "mmrazor"])
def test_a_saved_run_is_validated_and_tested(trained: Any, tmp_path: Path, scope: str) -> None:
    folder, _, whole = trained
    settings = config(default_scope=scope, load_from=str(folder / "epoch_4.pth"))
    settings.model.type = "AutoSlim"
    settings.val_cfg.type = "SubnetValLoop"
    settings.test_cfg.type = f"{scope}.SubnetValLoop"
    runner = start(settings, tmp_path, scope)
    metrics = runner.test()
    assert metrics == whole.metrics[-1]
    assert runner.model.mutator.current_choices == runner.model.mutator.max_choices


def test_the_present_subnet_alone_is_evaluated(trained: Any, tmp_path: Path) -> None:
    folder, _, whole = trained
    settings = config(load_from=str(folder / "epoch_4.pth"))
    settings.test_cfg.evaluate_fixed_subnet = True
    runner = start(settings, tmp_path, "fixed")
    runner.model.set_min_subnet()
    metrics = runner.test()
    assert set(metrics) == {"fix_subnet.accuracy/top1", "fix_subnet.flops", "fix_subnet.params"}
    assert metrics["fix_subnet.accuracy/top1"] == whole.metrics[-1]["min_subnet.accuracy/top1"]


def test_calibration_without_training_data_says_what_is_missing(trained: Any, tmp_path: Path) -> None:
    nothing = dict.fromkeys(("train_cfg", "train_dataloader", "optim_wrapper"))
    runner = start(config(**nothing), tmp_path, "untrained")
    with pytest.raises(errors.FastslimValueError, match="calibrate_sample_num needs training data"):
        runner.test()


def test_a_slimmable_network_trains_and_every_listed_subnet_is_evaluated(tmp_path: Path) -> None:
    unit = dict(
        type="SlimmableChannelUnit", default_args=dict(candidate_choices=[0.25, 1.0], choice_mode="ratio", divisor=2)
    )
    mutator = dict(type="SlimmableChannelMutator", channel_unit_cfg=unit, parse_cfg=MUTATOR["parse_cfg"])
    settings = config(
        model=dict(type="mmrazor.SlimmableNetwork", architecture=dict(type="ModeToy", width=16), mutator=mutator),
        val_cfg=dict(type="mmrazor.SlimmableValLoop"),
        train_cfg=dict(by_epoch=True, max_epochs=3),
    )
    settings.optim_wrapper.accumulative_counts = 2
    _, hook = train_without_samples(settings, tmp_path, "slimmable")
    assert set(hook.metrics[-1]) == {"subnet_0.accuracy/top1", "subnet_1.accuracy/top1"}
    assert min(hook.metrics[-1].values()) > 60.0
    assert set(hook.losses[-1]) == {"subnet_0.loss", "subnet_1.loss"}


def train_without_samples(settings: Config, work_dir: Path, name: str) -> tuple[Runner, Recorded]:
    runner, hook = start(settings, work_dir, name), Recorded()
    hook.before_train = lambda runner: None  # type: ignore[method-assign]
    runner.register_hook(hook)
    runner.train()
    return runner, hook


def test_greedy_search_finds_a_subnet_below_the_target(trained: Any, tmp_path: Path) -> None:
    folder, _, _ = trained
    settings = config(load_from=str(folder / "epoch_4.pth"))
    settings.test_cfg = dict(type="mmrazor.AutoSlimGreedySearchLoop", target_flops=(0.06, 0.03))
    runner = start(settings, tmp_path, "greedy")
    before = {key: value.clone() for key, value in runner.model.state_dict().items()}
    metrics = runner.test()
    loop = runner.test_loop
    assert [flops <= target for flops, target in zip(loop.searched_subnet_flops, (0.06, 0.03), strict=True)] == [
        True
    ] * 2
    assert list(metrics) == [f"FLOPS_{flops:.2f}M.accuracy/top1" for flops in loop.searched_subnet_flops]
    assert min(metrics.values()) > LEARNED
    for subnet, flops in zip(loop.searched_subnet, loop.searched_subnet_flops, strict=True):
        saved = yaml.safe_load((tmp_path / f"FLOPS_{flops:.2f}M.yaml").read_text())
        assert saved == subnet
        runner.model.set_subnet(saved)
        assert runner.model.subnet_cost(saved).multiply_adds / 1e6 == flops
    runner.model.set_max_subnet()
    for key, value in CheckpointLoader.load_checkpoint(str(folder / "epoch_4.pth"), "cpu")["state_dict"].items():
        assert torch.equal(runner.model.state_dict()[key], value), key
    assert before.keys() == runner.model.state_dict().keys()


def test_evolution_finds_a_subnet_within_its_range(trained: Any, tmp_path: Path) -> None:
    folder, _, _ = trained
    settings = config(load_from=str(folder / "epoch_4.pth"))
    settings.val_cfg = settings.val_dataloader = settings.val_evaluator = None
    settings.train_cfg = dict(
        type="mmrazor.EvolutionSearchLoop",
        dataloader=settings.test_dataloader,
        evaluator=settings.test_evaluator,
        max_epochs=2,
        num_candidates=3,
        top_k=2,
        num_mutation=1,
        num_crossover=1,
        max_keep_ckpts=1,
        constraints_range=dict(flops=(0.02, 0.07), params=0.006),
    )
    runner = start(settings, tmp_path, "evolution")
    runner.train()
    best = yaml.safe_load((tmp_path / "best_fix_subnet.yaml").read_text())
    cost = runner.model.subnet_cost(best)
    assert 0.02e6 <= cost.multiply_adds <= 0.07e6
    assert cost.parameters <= 6000
    alone = fastslim.export_subnet(runner.model, best).eval()
    alone.load_state_dict(torch.load(tmp_path / "best_subnet.pth", weights_only=True)["state_dict"])
    held_out = runner.train_loop.dataloader.dataset.images
    logits = alone(torch.stack([image for image, _ in held_out]))
    right = logits.argmax(1) == torch.tensor([label for _, label in held_out])
    assert float(right.float().mean()) * 100 > LEARNED
    assert [path.name for path in tmp_path.glob("search_epoch_*")] == ["search_epoch_2.json"]


def test_a_checkpoint_cannot_look_up_what_it_likes(tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> Any:
            return getattr, (torch.Tensor, "numpy")

    torch.save({"state_dict": {}, "message_hub": Harmful()}, tmp_path / "harmful.pth")
    with pytest.raises(Exception, match="is refused: not plain data"):
        CheckpointLoader.load_checkpoint(str(tmp_path / "harmful.pth"), "cpu")
