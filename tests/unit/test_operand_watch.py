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
