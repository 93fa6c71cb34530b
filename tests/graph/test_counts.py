"""Sizes that remember where they came from are ordinary integers; what is done with them is recorded or noticed."""

import builtins
import copy
import io
import operator
import pickle

import pytest
import torch
from torch import fx, nn

from fastslim.graph.capture import bind_inputs, capture
from fastslim.graph.counts import Count, noticing_ranges, plain


class Notes:
    """Stands for a recorder: writes down what it is told."""

    def __init__(self):
        self.recording, self.graph, self.done, self.used = True, fx.Graph(), [], []

    def digits_of(self, value):
        return value

    def count(self, value):
        return Count(value, self.graph.placeholder("size"), self)

    def record_count(self, function, operands):
        self.done.append((function, tuple(map(plain, operands))))
        return Count(function(*map(plain, operands)), self.graph.placeholder("result"), self)

    def record_test(self, function, operands):
        self.done.append((function, tuple(map(plain, operands))))
        return function(*map(plain, operands))

    def record_use(self, count, **kwargs):
        self.used.append(plain(count))


@pytest.mark.parametrize("name", ["add", "sub", "mul", "floordiv", "mod"])
def test_arithmetic_is_recorded_from_both_sides(name):
    notes, function = Notes(), getattr(operator, name)
    seven, two = notes.count(7), notes.count(2)
    results = [function(seven, 3), function(10, seven), function(seven, two), function(seven, True)]
    assert [int.__int__(r) for r in results] == [function(7, 3), function(10, 7), function(7, 2), function(7, True)]
    assert all(type(r) is Count for r in results)
    assert notes.done == [(function, (7, 3)), (function, (10, 7)), (function, (7, 2)), (function, (7, True))]
    assert notes.used == []


def test_chains_of_arithmetic_stay_recorded():
    notes = Notes()
    assert type((notes.count(12) // 4 + 1) * 2 - 3) is Count
    assert [function for function, _ in notes.done] == [operator.floordiv, operator.add, operator.mul, operator.sub]


@pytest.mark.parametrize("name", ["eq", "ne", "lt", "le", "gt", "ge"])
def test_comparisons_are_recorded_and_give_plain_truth(name):
    notes, function = Notes(), getattr(operator, name)
    seven = notes.count(7)
    for other in (7, 3, 7.5, notes.count(9)):
        assert function(seven, other) is function(7, plain(other))
    assert function(3, seven) is function(3, 7)
    assert [operands for _, operands in notes.done][:4] == [(7, 7), (7, 3), (7, 7.5), (7, 9)]
    assert len(notes.done) == 5 and notes.used == []


def test_truth_is_a_comparison_with_zero():
    notes = Notes()
    assert notes.count(2) and not notes.count(0)
    assert notes.done == [(operator.ne, (2, 0)), (operator.ne, (0, 0))]


def test_a_number_is_no_string_and_not_nothing():
    notes = Notes()
    assert notes.count(2) != "2" and notes.count(2) is not None and notes.count(2) != (2,)
    assert notes.done == notes.used == []


USES = {
    "float": lambda n: float(n),
    "int": lambda n: int(n),
    "true division": lambda n: n / 2,
    "divided by": lambda n: 2 / n,
    "power": lambda n: n**2,
    "root": lambda n: n**-0.5,
    "base": lambda n: 2**n,
    "times a float": lambda n: n * 0.5,
    "divmod": lambda n: divmod(n, 4),
    "negative": lambda n: -n,
    "absolute": lambda n: abs(n),
    "bits": lambda n: n & 3,
    "shifted": lambda n: 1 << n,
    "rounded": lambda n: round(n),
}


@pytest.mark.parametrize("use", USES)
def test_what_is_no_integer_arithmetic_is_right_and_noticed(use):
    notes = Notes()
    ours, theirs = USES[use](notes.count(6)), USES[use](6)
    assert ours == theirs and type(ours) is type(theirs)
    assert notes.used == [6] and notes.done == []


def test_range_is_right_and_noticed():
    notes, original = Notes(), builtins.range
    with noticing_ranges():
        assert list(range(notes.count(3))) == [0, 1, 2]
        assert notes.used == [3]
        assert list(range(1, notes.count(7), notes.count(2))) == [1, 3, 5]
        assert notes.used == [3, 7, 2]
        assert isinstance(range(2), range) and isinstance(original(2), range) and not isinstance([], range)
        assert range(4) == original(4)
    assert builtins.range is original


def test_range_is_put_back_after_an_error():
    original = builtins.range
    with pytest.raises(KeyError), noticing_ranges():
        raise KeyError
    assert builtins.range is original


def test_copies_are_plain_numbers():
    count = Notes().count(5)
    buffer = io.BytesIO()
    torch.save({"size": count}, buffer)
    buffer.seek(0)
    copies = [
        copy.deepcopy(count),
        copy.copy(count),
        pickle.loads(pickle.dumps(count)),
        torch.load(buffer, weights_only=False)["size"],
    ]
    assert [type(c) for c in copies] == [int] * 4 and copies == [5] * 4


def test_it_is_an_integer_to_everyone():
    notes = Notes()
    count = notes.count(3)
    assert isinstance(count, int) and hash(count) == hash(3)
    assert {3: "three"}[count] == "three" and {count: 1}[3] == 1
    assert [0, 1, 2, 9][count] == 9 and "abcd"[count] == "d"
    assert f"{count} {count:03d} {count!r}" == "3 003 3"
    assert torch.zeros(count).shape == (3,)
    assert plain(count) == 3 and type(plain(count)) is int and plain("x") == "x"


def test_nothing_is_noted_while_nothing_is_recorded():
    notes = Notes()
    notes.recording = False
    count = notes.count(6)
    results = [count + 1, 1 + count, count // 4, count == 6, float(count), bool(count), count * 0.5]
    assert results == [7, 7, 1, True, 6.0, True, 3.0]
    assert not any(type(r) is Count for r in results)
    assert notes.done == notes.used == []


class Sizes(nn.Module):
    """Calls a function with the sizes of its input."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return x * self.function(*x.shape)


def recorded(function, shape=(2, 3, 8, 8)):
    model = Sizes(function)
    return capture(model, bind_inputs(model, shape)).root


def test_a_size_is_recorded_where_it_is_asked_for():
    root = recorded(lambda n, c, h, w: h * w // 2)
    assert [(node.target, node.meta["value"]) for node in root.graph.nodes if "value" in node.meta][-2:] == [
        (operator.mul, 64),
        (operator.floordiv, 32),
    ]
    assert root.guards == []


def test_numel_and_len_are_counts():
    class Net(nn.Module):
        def forward(self, x):
            return x / 1.0 * (x.numel() // len(x)), x.view(x.nelement())

    model = Net()
    root = capture(model, bind_inputs(model, (2, 3))).root
    assert [guard.value for guard in root.guards] == [2]  # len() must return a plain integer
