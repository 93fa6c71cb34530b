"""AutoSlim under a Lightning Trainer: fits digits, equals train_step, resumes, refuses what would train wrongly."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import textwrap

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import fastslim
from fastslim.data.digits import digits
from fastslim.integrations.lightning import SlimmableModule

QUIET = dict(
    accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False
)
# What Lightning says of a small CPU run, and torch of a data loader without workers.
pytestmark = pytest.mark.filterwarnings("ignore::Warning")


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, 2, 1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


def algorithm(**options) -> fastslim.AutoSlim:
    torch.manual_seed(0)
    return fastslim.AutoSlim(architecture=network(), input_shape=(1, 1, 8, 8), divisor=4, seed=0, **options)


def loaders(batch_size: int = 64) -> tuple[DataLoader, DataLoader]:
    train, held_out = digits()
    return DataLoader(train, batch_size, drop_last=True), DataLoader(held_out, 256)


def test_one_fit_learns_digits_at_every_width() -> None:
    module = SlimmableModule(
        algorithm(),
        lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True),
        lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6),
        val_widths=(0.25, 1.0),
    )
    trainer = pl.Trainer(max_epochs=6, **QUIET)
    train, held_out = loaders()
    trainer.fit(module, train, held_out)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert trainer.global_step == 6 * len(train)
    assert metrics["val/accuracy_1.00x"] > 0.9 and metrics["val/accuracy_0.25x"] > 0.7
    assert {"train/max_subnet.loss", "train/min_subnet.loss_kl", "val/loss_0.25x"} <= metrics.keys()
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-6)
    algo = module.algo.eval()
    small = fastslim.export_subnet(algo, algo.uniform_subnet(0.25))
    images, labels = next(iter(held_out))
    assert (small.eval()(images).argmax(1) == labels).double().mean() > 0.7  # calibrated by the validation


def test_a_fit_is_train_step_by_train_step() -> None:
    algo = algorithm()
    plain = copy.deepcopy(algo)
    train, _ = loaders()
    pl.Trainer(max_epochs=1, limit_train_batches=4, **QUIET).fit(SlimmableModule(algo), train)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9)
    for batch, _ in zip(train, range(4), strict=False):
        plain.train_step(batch, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(algo.parameters(), plain.parameters(), strict=True))


def test_accumulated_and_clipped_gradients_are_those_of_a_loop() -> None:
    algo = algorithm()
    plain = copy.deepcopy(algo)
    train, _ = loaders()
    module = SlimmableModule(algo, gradient_clip_val=0.1, accumulate_grad_batches=2)
    trainer = pl.Trainer(max_epochs=1, limit_train_batches=5, **QUIET)
    trainer.fit(module, train)
    assert trainer.global_step == 3  # the last batch makes a step of its own
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9)
    for index, batch in zip(range(5), train, strict=False):
        if index % 2 == 0:
            optimizer.zero_grad()
        plain.accumulate(batch, scale=0.5)
        if index in (1, 3, 4):
            nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(algo.parameters(), plain.parameters(), strict=True))


def test_a_resumed_fit_ends_as_an_uninterrupted_one(tmp_path) -> None:
    train, _ = loaders()
    whole, first, second = SlimmableModule(algorithm()), SlimmableModule(algorithm()), SlimmableModule(algorithm())
    pl.Trainer(max_epochs=2, limit_train_batches=3, **QUIET).fit(whole, train)
    options = {**QUIET, "enable_checkpointing": True}
    trainer = pl.Trainer(max_epochs=1, limit_train_batches=3, default_root_dir=tmp_path, **options)
    trainer.fit(first, train)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    second.algo.mutator.rng.seed(99)
    pl.Trainer(max_epochs=2, limit_train_batches=3, **QUIET).fit(second, train, ckpt_path=tmp_path / "last.ckpt")
    for a, b in zip(whole.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_bf16_mixed_trains() -> None:
    module = SlimmableModule(algorithm())
    seen = []
    module.algo.architecture[0].register_forward_hook(lambda layer, inputs, output: seen.append(output.dtype))
    train, _ = loaders()
    pl.Trainer(max_epochs=1, limit_train_batches=2, precision="bf16-mixed", **QUIET).fit(module, train)
    assert set(seen) == {torch.bfloat16}


def test_a_loss_scaler_outside_the_step_is_refused() -> None:
    trainer = pl.Trainer(max_epochs=1, **QUIET)
    module = SlimmableModule(algorithm())
    module._trainer = trainer
    trainer.strategy.precision_plugin.precision = "16-mixed"
    with pytest.raises(ValueError, match="use 'bf16-mixed'"):
        module.on_fit_start()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(algo=nn.Linear(1, 1)), TypeError, "algo should be an AutoSlim or SlimmableNetwork, but got"),
        (dict(val_widths=(0.5, 2)), ValueError, "ratios above 0 and up to 1"),
        (dict(scheduler_interval="epochs"), ValueError, "did you mean 'epoch'"),
        (dict(accumulate_grad_batches=0), ValueError, "must be at least 1"),
    ],
)
def test_bad_arguments_are_named(options, error, message) -> None:
    with pytest.raises(error, match=message):
        SlimmableModule(**{"algo": algorithm(), **options})


TWO_PROCESSES = """
    import sys, torch, lightning.pytorch as pl
    from torch.utils.data import DataLoader
    sys.path.insert(0, {tests!r})
    from test_lightning import SlimmableModule, algorithm, digits

    if __name__ == "__main__":
        module = SlimmableModule(algorithm(), val_widths=(0.5,))
        train, held_out = digits()
        trainer = pl.Trainer(
            accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, limit_train_batches=3, logger=False,
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        )
        trainer.fit(module, DataLoader(train, 32), DataLoader(held_out, 128))
        weights = torch.cat([p.detach().flatten() for p in module.algo.parameters()])
        torch.save(weights, sys.argv[1] + f"/{{trainer.global_rank}}.pt")
"""


def test_two_processes_end_with_the_same_weights(tmp_path) -> None:
    script = tmp_path / "two.py"
    script.write_text(textwrap.dedent(TWO_PROCESSES.format(tests=os.path.dirname(__file__))))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert torch.equal(first, second)
    before = torch.cat([p.detach().flatten() for p in algorithm().parameters()])
    assert not torch.equal(first, before)
