"""Property: any network assembled from the constructs equals its independent construction at any width."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from zoo.architecture import randomise
from zoo.assembled import STEPS, assemble
from zoo.check import RATIOS, assert_same, call, narrow_copy

import fastslim
from fastslim import ops

steps = st.lists(st.tuples(st.sampled_from(STEPS), st.sampled_from([4, 8, 12])), min_size=1, max_size=5)


def check(chosen, flatten):
    torch.manual_seed(0)
    architecture = assemble(chosen, flatten)
    model = architecture.build()
    randomise(model)
    model.double()
    plain, inputs = copy.deepcopy(model), architecture.inputs(2)
    mutator = fastslim.convert(model, inputs, choices=RATIOS, divisor=1, seed=0).mutator
    assert mutator.mutable_units
    inputs = architecture.inputs(3)
    for training in (False, True):
        with ops.use_backend("reference"):
            ours, theirs = (call(net.train(training), inputs) for net in (model, plain))
        assert torch.equal(ours[0], theirs[0])
    for choices in (mutator.max_choices, mutator.min_choices, mutator.sample_choices(), mutator.sample_choices()):
        mutator.set_choices(choices)
        narrow, where = narrow_copy(architecture, plain, mutator, choices)
        model.load_state_dict(plain.state_dict())
        assert_same(model, narrow, where, inputs)


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(chosen=steps, flatten=st.booleans())
def test_any_assembled_network_equals_its_independent_construction(chosen, flatten):
    check(chosen, flatten)


@pytest.mark.parametrize("step", STEPS)
def test_every_step_alone_and_behind_a_concatenation(step):
    check([(step, 12)], True)
    check([(STEPS[2], 4), (step, 8), (step, 4)], False)
