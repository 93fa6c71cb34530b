"""The zoo's networks cost what is counted on them: functions and shared layers, windows, channels as positions, ..."""

from __future__ import annotations

from dataclasses import asdict

import pytest
from counted_run import counted_run
from zoo import ZOO, make

import fastslim
from fastslim.cost import cost_of

# Operators that make copies for themselves: attention and recurrent layers, products of tensors that do not lie in
# memory as the library wants them, reshapes that become views when one head is left.
OWN_MEMORY = {
    *("Multihead", "Encoder", "Translator", "LearnedQueries", "TextNet"),
    *("FusedQKV", "MergedHeads", "GroupedQueryAttention", "GPT2", "TalkingHeads", "Swin"),
}
NOT_COUNTED = {"TwoTowers": "the product of two activations", "TextNet": "a recurrent layer"}
# At narrow widths its own batch norm is exported without the number of batches it has seen.
WITHOUT_A_COUNT = {"Subclassed"}
# Its child called `code` cannot be called in the fx.GraphModule that it is exported as.
NOT_EXPORTED = {"Autoencoder"}


@pytest.mark.parametrize("name", sorted(ZOO.keys() - NOT_EXPORTED))
def test_the_zoo_costs_what_is_counted(name: str) -> None:
    model, inputs = make(name)
    mutator = fastslim.convert(model.eval(), inputs, choices=[0.25, 0.5, 0.75, 1.0], divisor=1, seed=1).mutator
    widest = mutator.max_choices
    for subnet in (widest, mutator.min_choices, mutator.sample_choices()):
        cost, counted = asdict(cost_of(model, subnet)), counted_run(fastslim.export_subnet(model, subnet), inputs)
        assert cost.keys() == counted.keys()
        if name in OWN_MEMORY:
            del cost["peak_activation_bytes"], counted["peak_activation_bytes"]
        if name in NOT_COUNTED:
            assert cost.pop("multiply_adds") < counted.pop("multiply_adds")
        if name in WITHOUT_A_COUNT:
            cost["weight_bytes"] -= 8 * (subnet is not widest)
        assert cost == counted


@pytest.mark.parametrize("name", ["Swin", "Translator", "Residual"])
def test_the_report_shows_the_same_multiply_adds(name: str) -> None:
    model, inputs = make(name)
    report = fastslim.convert(model.eval(), inputs, divisor=1)
    assert report.multiply_adds == cost_of(model, {}).multiply_adds
