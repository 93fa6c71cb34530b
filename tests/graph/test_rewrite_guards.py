"""What a rewritten forward was not recorded for, sizes and arguments, is right or refused."""

import pytest
import torch
from rewritten_nets import Net, assert_is_narrow, converted, image, narrow

from fastslim.errors import FastslimRuntimeError


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (5, 3, 8, 8), (2, 3, 16, 16), (3, 3, 5, 9)])
def test_other_batches_and_images_are_right(shape):
    model, plain = converted(Net())
    assert_is_narrow(model, plain, image(*shape))


STEERED = {
    "batch of one": lambda s, x: (x if x.shape[0] == 1 else x * 2) * s.scale,
    "odd height": lambda s, x: (x[:, :, :-1] if x.shape[2] % 2 else x) * s.scale,
    "larger than": lambda s, x: (x.mean((2, 3), keepdim=True) if x.shape[2] > 12 else x) * s.scale,
    "truth": lambda s, x: (x if x.shape[3] - 8 else x + 1) * s.scale,
    "two sizes": lambda s, x: (x if x.shape[2] == x.shape[3] else x + 1) * s.scale,
    "loop": lambda s, x: sum(x[:, :, i] * s.scale[:, 0] for i in range(x.shape[2])).unsqueeze(2),
    "number": lambda s, x: x * s.scale / float(x.shape[2]),
    "root": lambda s, x: x * s.scale * x.shape[2] ** -0.5,
    "pieces": lambda s, x: sum(row * s.scale[:, 0] for row in x.unbind(2)).unsqueeze(2),
    "constant view": lambda s, x: (x.flatten(2).view(-1, s.c, 64) * s.scale[:, 0]).view(x.shape),
    "position table": lambda s, x: x * s.scale + torch.arange(8.0).double(),
    "length": lambda s, x: x * s.scale * len(x),
    "times a float": lambda s, x: x * s.scale * (x.shape[2] * 0.5),
}


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (4, 3, 8, 8), (2, 3, 9, 8), (2, 3, 16, 16), (2, 3, 8, 10)])
@pytest.mark.parametrize("case", STEERED)
def test_sizes_that_steer_python_are_right_or_refused(case, shape):
    """Never a wrong number: where the network itself fails, or its Python code would go another way, an error."""
    model, plain = converted(Net(function=STEERED[case]))
    assert vars(model.scaled)["forward"].narrow
    x = image(*shape)
    try:
        expected = narrow(model, plain)(x)
    except (RuntimeError, IndexError):
        with pytest.raises(RuntimeError):
            model(x)
        return
    try:
        got = model(x)
    except FastslimRuntimeError as error:
        refusal = str(error)
    else:
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
        refusal = "test_rewrite_guards.py: example inputs"
    assert "test_rewrite_guards.py:" in refusal and "example inputs" in refusal


@pytest.mark.parametrize(("case", "shape"), [("batch of one", (4, 3, 8, 8)), ("odd height", (2, 3, 16, 8))])
def test_a_comparison_with_the_same_outcome_is_no_reason_to_refuse(case, shape):
    model, plain = converted(Net(function=STEERED[case]))
    assert_is_narrow(model, plain, image(*shape))


ARGUMENTS = {
    "by position": lambda scaled, x: scaled(x, 3),
    "by keyword": lambda scaled, x: scaled(factor=3, x=x),
    "flag": lambda scaled, x: scaled(x, flag=True),
    "dict of tensors": lambda scaled, x: scaled(x, more={"bias": x * 2}),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments_of_every_kind(case):
    model, plain = converted(Net(call=ARGUMENTS[case]))
    assert vars(model.scaled)["forward"].narrow
    assert_is_narrow(model, plain, image(3, 3, 8, 8))


@pytest.mark.parametrize(
    "call", [lambda m, x: m(x, 2), lambda m, x: m(x, flag=True), lambda m, x: m(x, more={"bias": x})]
)
def test_other_arguments_than_recorded_are_refused(call):
    model, _ = converted(Net())
    x = image(2, 1, 8, 8)
    with pytest.raises(FastslimRuntimeError, match="Scaled is called with.*exclude the module"):
        call(model.scaled, x)
    with pytest.raises(TypeError):
        model.scaled(x, unknown=1)
    model._fastslim_mutator.set_max_choices()
    call(model.scaled, image(2, 8, 8, 8))
