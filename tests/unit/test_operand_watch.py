"""The watch names every operand that was not finite, however many amaxes it has taken in."""

from __future__ import annotations

import pytest
import torch

from metis.clock import OperandWatch


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(("count", "bad"), [(1, 0), (5, 4), (100, 0), (100, 31), (100, 32), (100, 99)])
def test_one_bad_amax_among_many_is_named(value: float, count: int, bad: int):
    watch = OperandWatch()
    for index in range(count):
        watch.note_amax("first", "fprop_input", torch.tensor(float(index)))
        watch.note_amax("second", "fprop_input", torch.tensor(value if index == bad else 1.0))
        watch.note_amax("second", "fprop_weight", torch.tensor(2.0))
    assert watch.take_nonfinite() == [("second", "fprop_input")]
    assert watch.take_nonfinite() == []


def test_what_nobody_asks_for_does_not_pile_up():
    watch, same = OperandWatch(), torch.tensor(1.0)
    for index in range(10_000):
        watch.note_amax("l", "fprop_input", torch.tensor(float(index)))
        watch.note_amax("l", "fprop_weight", same)
    assert sum(map(len, watch._amaxes.values())) <= 33


def test_amaxes_that_were_taken_can_be_put_back_again_and_again():
    """What a captured step noted is noted anew after each replay, with what its memory holds then."""
    watch, amax = OperandWatch(), torch.tensor(1.0)
    watch.note_amax("layer", "fprop_input", amax)
    noted = watch.take_noted()
    assert watch.take_nonfinite() == []
    watch.put_back(noted)
    assert watch.take_nonfinite() == []
    noted.values.fill_(float("inf"))
    watch.put_back(noted)
    watch.put_back(noted)  # nobody asked in between
    watch.note_amax("layer", "fprop_weight", torch.tensor(float("nan")))
    assert watch.take_nonfinite() == [("layer", "fprop_input"), ("layer", "fprop_weight")]
    assert watch.take_nonfinite() == []
