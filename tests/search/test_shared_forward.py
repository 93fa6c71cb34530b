"""What subnets have in common is computed once, and their scores are the very same as one after the other."""

from __future__ import annotations

import random
import weakref

import pytest
import search_cases as cases
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastslim
from fastslim.search import greedy
from fastslim.search.recorded_forward import RecordedForward
from fastslim.search.scorer import SubnetScorer


class Chain(nn.Sequential):
    """Six convolutions with batch norm, one after the other."""

    def __init__(self) -> None:
        blocks = []
        for n in range(6):
            blocks += [nn.Conv2d(8 if n else 1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)]
        super().__init__(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, cases.CLASSES))


class InPlace(nn.Module):
    """Additions, activations and assignments that change what they read."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(c, 8, 3, padding=1) for c in (1, 8, 8))
        self.second_bn, self.third_bn = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, cases.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, 6, 6) -> (N, classes)."""
        x = F.relu(self.first(x), inplace=True)
        y = self.second_bn(self.second(x)).relu_()
        x += y
        x = F.relu_(x)
        z = self.third_bn(self.third(x))
        x += z
        return self.head(x.mean((2, 3)))


class Branches(nn.Module):
    """Three branches behind a stem, side by side and then added to a gate; one layer is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.wide, self.tall = nn.Conv2d(8, 8, (1, 3), padding=(0, 1)), nn.Conv2d(8, 6, (3, 1), padding=(1, 0))
        self.norm = nn.BatchNorm2d(14)
        self.gate = nn.Linear(8, 14)
        self.twice = nn.Conv2d(14, 14, 1)
        self.head = nn.Linear(14, cases.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, 6, 6) -> (N, classes)."""
        x = self.stem(x).relu()
        y = self.norm(torch.cat([self.wide(x), self.tall(x)], 1))
        gate = torch.sigmoid(self.gate(x.mean((2, 3))))
        y = self.twice(self.twice(y * gate[:, :, None, None]).relu())
        return self.head(y.amax((2, 3)))


class Shuffled(nn.Module):
    """A rewritten forward inside: channels are counted."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.attention = Attention()
        self.head = nn.Linear(8, cases.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, 6, 6) -> (N, classes)."""
        x = self.attention(self.stem(x))
        return self.head(x.mean((2, 3)))


class Attention(nn.Module):
    """Splits a fused layer where numbers say."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.out = nn.Conv2d(8, 16, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 8, 6, 6) -> (N, 8, 6, 6)."""
        a, b = self.both(x).split(8, 1)
        return self.out(a * torch.sigmoid(b))


def mobile() -> nn.Module:
    return fastslim.models.mobilenet_v2(num_classes=cases.CLASSES, width_mult=0.25, small_images=True)


NETS = {
    "chain": Chain,
    "residual": cases.ToyNet,
    "in place": InPlace,
    "branches": Branches,
    "rewritten": Shuffled,
    "mobilenet": mobile,
}
CHANNELS = {"mobilenet": 3}


def likelihood(output: Tensor, targets: Tensor) -> Tensor:
    return -F.cross_entropy(output, targets, reduction="none")


def make(kind: str, dtype: torch.dtype = torch.float64, **options: object) -> tuple[fastslim.AutoSlim, list]:
    torch.manual_seed(0)
    channels = CHANNELS.get(kind, 1)
    options = {"choices": [0.25, 0.5, 0.75, 1.0], "divisor": 2, "seed": 0, **options}
    net = NETS[kind]() if kind in NETS else options.pop("net")
    algo = fastslim.AutoSlim(architecture=net, example_inputs=torch.randn(2, channels, 6, 6), **options)
    data = [(images.to(dtype).repeat(1, channels, 1, 1), labels) for images, labels in cases.toy_data()]
    return algo.to(dtype), data


def narrower(algo: fastslim.AutoSlim, base: dict[str, int]) -> list[dict[str, int]]:
    """The candidates of a decision."""
    units = {unit.name: unit.candidate_widths for unit in algo.mutator.mutable_units}
    return [
        {**base, name: max(width for width in widths if width < base[name])}
        for name, widths in sorted(units.items())
        if base[name] > widths[0]
    ]


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("kind", NETS)
def test_scores_are_bit_by_bit_those_of_whole_forwards(kind, calibrated, in_place) -> None:
    algo, data = make(kind)
    for module in algo.modules():
        if hasattr(module, "inplace"):
            module.inplace = in_place
    before = cases.snapshot(algo)
    with SubnetScorer(algo, data, metric=likelihood, calibration=data[:1] if calibrated else None) as scorer:
        assert scorer.reason == ""
        for base in (algo.mutator.max_choices, algo.sample_subnet(), algo.sample_subnet()):
            for subnets in (narrower(algo, base), [algo.sample_subnet() for _ in range(3)], [base, base]):
                assert scorer.score_all(subnets) == [scorer(choices) for choices in subnets]
    cases.assert_unchanged(algo, before)


def test_a_layer_before_the_narrowed_unit_is_called_once_for_all_candidates() -> None:
    algo, data = make("chain")
    calls: dict[str, int] = {}
    with SubnetScorer(algo, data, metric=likelihood) as scorer:
        for name, layer in algo.architecture.named_modules():
            if isinstance(layer, nn.Conv2d):
                layer.register_forward_hook(lambda *_, name=name: calls.update({name: calls.get(name, 0) + 1}))
        subnets = narrower(algo, algo.mutator.max_choices)
        assert len(subnets) == 6
        scorer.score_all(subnets)
    # The full network's prefix, and every candidate from its own layer on: the n-th layer is called by n of them.
    # The full network stops at the last layer, which every candidate computes itself.
    assert [calls[name] // cases.BATCHES for name in sorted(calls, key=int)] == [2, 3, 4, 5, 6, 6]


def test_values_are_let_go_when_nobody_reads_them_any_more(monkeypatch) -> None:
    algo, data = make("chain")
    alive: list[weakref.ref] = []
    most = 0
    call = RecordedForward.call

    def counted(forward: RecordedForward, node, values, kept=()):
        nonlocal most
        value = call(forward, node, values, kept)
        if node.op == "call_module":
            alive.append(weakref.ref(value))
        most = max(most, sum(one() is not None for one in alive))
        return value

    with SubnetScorer(algo, data, metric=likelihood) as scorer:
        monkeypatch.setattr(RecordedForward, "call", counted)
        scorer.score_all(narrower(algo, algo.mutator.max_choices))
    # A value of the full network, what a layer of a candidate reads and makes, and the output of the one before.
    assert most <= 5


@pytest.mark.parametrize("kind", ["residual", "branches", "mobilenet"])
def test_greedy_decides_the_same_with_and_without(kind, monkeypatch) -> None:
    algo, data = make(kind, torch.float32)
    together = greedy(algo, data, {"flops": 0.4}, progress=False)
    monkeypatch.setattr(SubnetScorer, "score_all", lambda scorer, subnets: [scorer(choices) for choices in subnets])
    assert greedy(algo, data, {"flops": 0.4}, progress=False) == together


class ReadsAgain(Chain):
    """Looks at a tensor that it has changed in place."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, 6, 6) -> (N, classes)."""
        x = self[0](x)
        y = x.flatten(1)
        x.relu_()
        return super().forward((x + y.view_as(x)).mean(1, keepdim=True))


class Sizes(Chain):
    """Decides by a size."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, 6, 6) -> (N, classes)."""
        return super().forward(x * 2 if x.shape[0] > 3 else x)


class Random(Chain):
    """Draws in evaluation, too."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, 6, 6) -> (N, classes)."""
        return super().forward(F.dropout(x, 0.5, training=True))


class Again(nn.Module):
    """Calls a batch norm twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.bn = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, cases.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, 6, 6) -> (N, classes)."""
        x = self.bn(self.first(x)).relu()
        return self.head(self.bn(self.second(x)).mean((2, 3)))


@pytest.mark.parametrize(
    ("net", "reason"),
    [
        (ReadsAgain, "changes a tensor in place and reads it again"),
        (Sizes, r"turns a size into a Python number or a branch at .*test_shared_forward\.py"),
        (Random, "the recorded forward is not the network's own"),
        (Again, "forward calls bn more than once"),
    ],
)
def test_forwards_that_cannot_be_split_are_run_as_a_whole_and_the_reason_is_told(net, reason, capsys) -> None:
    algo, data = make("", net=net())
    with SubnetScorer(algo, data, metric=likelihood) as scorer:
        assert scorer.shared is None
        with pytest.raises(AssertionError, match=reason):
            raise AssertionError(scorer.reason)
        subnets = narrower(algo, algo.mutator.max_choices)
        torch.manual_seed(1)
        scores = scorer.score_all(subnets)
        torch.manual_seed(1)
        assert scores == [scorer(choices) for choices in subnets]
    greedy(algo, data, {"flops": 0.5}, metric=likelihood)
    assert "every subnet is computed from the input on: " in capsys.readouterr().out


def test_hooks_of_the_users_are_called_for_every_candidate() -> None:
    algo, data = make("residual")
    seen = []
    algo.architecture.register_forward_hook(lambda *_: seen.append(1))
    with SubnetScorer(algo, data, metric=likelihood) as scorer:
        assert scorer.reason == "the network as a whole is watched by a hook"
        seen.clear()
        scorer.score_all(narrower(algo, algo.mutator.max_choices))
    assert len(seen) == 3 * cases.BATCHES


def test_other_arguments_than_the_example_inputs_are_run_as_a_whole() -> None:
    algo, data = make("residual")
    data = [({"x": images}, labels) for images, labels in data]
    with SubnetScorer(algo, data, metric=likelihood) as scorer:
        assert scorer.reason == "", "by keyword is the same argument"


def test_batches_of_other_sizes_than_the_example_inputs_are_shared_too() -> None:
    algo, data = make("chain")
    images, labels = data[0]
    data = [(images, labels), (images[:5], labels[:5]), (images[:, :, :, :4], labels)]
    with SubnetScorer(algo, data, metric=likelihood) as scorer:
        assert scorer.reason == ""
        subnets = random.Random(0).sample(narrower(algo, algo.sample_subnet()), 4)
        assert scorer.score_all(subnets) == [scorer(choices) for choices in subnets]
