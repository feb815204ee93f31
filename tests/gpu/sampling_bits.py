"""Picking rows by kernels against the masks that define it, row by row and bit by bit.

On a GPU: `python tests/gpu/sampling_bits.py`. On a CPU under Triton's interpreter: `TRITON_INTERPRET=1 python
tests/gpu/sampling_bits.py --device cpu`; tests/numerics/test_sampling.py does that.

Ends with a JSON object: comparisons made, what differed, and for bases that are renewed from rows picked
either way how many elements of V differ.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from metis import bases
from metis.clock import TrainingClock
from metis.config import CELL_NAMES, Recipe
from metis.decompose.sampling import MARK_COLUMNS, hash_threshold, sample_rows
from metis.kernels.sampling import row_amax, take_rows
from metis.nn import MetisLinear, advance_bases
from metis.operand import Axis
from metis.recipes import METIS
from metis.rng import NoisePosition, stream_key

DTYPES = (torch.bfloat16, torch.float32, torch.float16)
SHAPES = ((200, 40, 0.2, 8), (130, 17, 1.0, 0), (64, 300, 0.0, 3), (5, 16, 0.3, 8), (1, 1, 0.5, 1))
LARGE = ((8192, 512, 0.05, 8), (40000, 80, 0.02, 8), (300000, 16, 0.001, 8))
POSITIONS = (NoisePosition(0, 0), NoisePosition(7, 2**31 + 5), NoisePosition(2**32 - 1, 3))

CENTRED = replace(
    METIS,
    name="centred",
    **{
        name: replace(cell, split=replace(cell.split, mean_first=True))
        for name in CELL_NAMES
        if (cell := getattr(METIS, name)).split is not None and "weight" not in name
    },
)
"""Rows less the mean over tokens are sketched."""


class Ledger:
    def __init__(self) -> None:
        self.checks, self.different = 0, []

    def same(self, name: str, actual: Tensor, expected: Tensor) -> None:
        self.checks += 1
        if actual.shape != expected.shape or not torch.equal(_bits(actual), _bits(expected)):
            self.different.append(name)


def _bits(x: Tensor) -> Tensor:
    return x.cpu().contiguous().view(torch.uint8)


def matrices(num_rows: int, num_cols: int, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yield a random matrix, one with equal rows and extreme values, and a slice of a wider one."""
    x = torch.randn(num_rows, num_cols, generator=torch.Generator().manual_seed(num_rows)).to(dtype)
    yield "random", x
    odd = x.clone()
    odd[num_rows // 2] = odd[0]
    odd[num_rows // 3] = 0
    odd[-1, -1] = -float("inf")
    odd[num_rows // 4, 0] = float("nan")
    yield "odd", odd
    yield "constant", torch.full((num_rows, num_cols), -0.5, dtype=dtype)
    yield "strided", torch.cat([x, x], dim=1)[:, :num_cols]


def check_rows(ledger: Ledger, device: str, shapes: tuple[tuple[int, int, float, int], ...]) -> None:
    for number, (num_rows, num_cols, probability, num_pinned) in enumerate(shapes):
        for dtype in DTYPES:
            for kind, x in matrices(num_rows, num_cols, dtype):
                name = f"{num_rows}x{num_cols}, {dtype}, {kind}"
                amax = row_amax(x.to(device))
                expected = x.abs().amax(dim=1).float()
                expected[expected.isnan()] = float("nan")
                ledger.same(f"amax, {name}", amax, expected)
                index = torch.arange(num_rows) * 3
                if kind == "constant":
                    index = torch.randperm(num_rows, generator=torch.Generator().manual_seed(number))
                position = POSITIONS[ledger.checks % len(POSITIONS)]
                sample = {"position": position, "probability": probability, "num_pinned_rows": num_pinned}
                check_choice(ledger, name, x, expected, index, sample, device)


def check_choice(
    ledger: Ledger, name: str, x: Tensor, amax: Tensor, index: Tensor, sample: dict[str, Any], device: str
) -> None:
    """Compare all rows, two halves as ranks would hold them, and too few places."""
    key, rest = stream_key(sample["position"].step, "rows"), dict(sample)
    mask = sample_rows(key, rows=index, row_amax=amax, **rest)
    chosen, middle, last = int(mask.sum()), len(mask) // 2, len(mask)
    rest["threshold"] = hash_threshold(rest.pop("probability"))
    places = [(0, last, chosen + 5), (0, last, max(1, chosen - 2)), (0, middle, chosen + 1),
              (middle, last, chosen + 1)]  # fmt: skip
    for start, stop, num_places in places:
        if start == stop:
            continue
        actual = take_rows(
            x[start:stop].to(device), amax.to(device), index.int().to(device), key=key,
            num_places=num_places, num_mark_columns=MARK_COLUMNS, first=start, **rest,
        )  # fmt: skip
        expected = placed(x[start:stop][mask[start:stop]], num_places)
        ledger.same(f"{name}, {start}:{stop} in {num_places}", actual, expected)


def placed(rows: Tensor, places: int) -> Tensor:
    """Return rows as the kernel lays them out."""
    out = rows.new_zeros((places, rows.shape[1] + MARK_COLUMNS))
    rows = rows[:places]
    out[: len(rows), : rows.shape[1]] = rows
    out[: len(rows), rows.shape[1]] = 1
    return out


def differing_bases(device: str, recipe: Recipe, num_steps: int = 8) -> dict[str, int]:
    """Renew bases from rows picked either way; return the elements of V that differ, for each basis."""
    states, by_kernel = [], bases.picks_by_kernel
    for choice in (lambda x: True, lambda x: False):
        bases.picks_by_kernel = choice
        clock = TrainingClock(seed=4, num_tokens_per_step=512)
        torch.manual_seed(0)
        layer = MetisLinear(64, 48, bias=False, recipe=recipe, name="layer", clock=clock).to(device)
        train(layer, num_steps)
        states.append({name: basis.state for name, basis in layer.core.own_bases()})
    bases.picks_by_kernel = by_kernel
    for name, state in states[0].items():
        other = states[1][name]
        assert state.num_refreshes == other.num_refreshes == 3 and state.num_kept == 0, name
    return {name: int((state.v != states[1][name].v).sum()) for name, state in states[0].items()}


def train(layer: MetisLinear, num_steps: int) -> None:
    """Put rows of two microbatches a step aside, and renew the bases."""
    clock, core, device = layer.clock, layer.core, layer.weight.device
    for step in range(num_steps):
        clock.begin_step(step, 512)
        for microbatch in (2 * step, 2 * step + 1):
            clock.begin_microbatch(microbatch)
            sketch = core.plan(Axis.whole(256)).sketch
            for name, size in (("input", 64), ("grad_output", 48)):
                generator = torch.Generator().manual_seed(100 * microbatch + size)
                x = torch.randn(256, size, generator=generator) * torch.linspace(4, 0.1, size) + 1.0
                if sketch is not None:
                    sketch.add(name, sketch.pick(name, x.to(device)))
        advance_bases([(core, layer.weight)], step)


def compiled_for_steps() -> dict[str, int]:
    """Compile for a Hopper GPU without one; return how often the first step and later ones compiled."""
    import kernel_code
    from triton.runtime import driver

    from metis.kernels import arguments

    driver.set_active(kernel_code.HopperDriver())
    arguments.reason_unavailable = lambda device: None
    compiler, counts = kernel_code.Compiler(fuse=False), []
    x, index = torch.zeros(256, 512, dtype=torch.bfloat16), torch.zeros(256, dtype=torch.int32)
    for number, position in enumerate(POSITIONS):
        take_rows(
            x, row_amax(x), index, key=stream_key(number, "rows"), position=position,
            threshold=hash_threshold((0.0, 0.3, 1.0)[number]), num_pinned_rows=8, num_places=48,
            num_mark_columns=MARK_COLUMNS,
        )  # fmt: skip
        counts.append(len(compiler.compiled))
    return {"first": counts[0], "later": counts[-1] - counts[0]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--compile", action="store_true", help="only compile, for a Hopper GPU")
    args = parser.parse_args()
    if args.compile:
        print(json.dumps(compiled_for_steps()))
        return 0
    device = args.device
    ledger = Ledger()
    check_rows(ledger, device, SHAPES if device == "cpu" else (*SHAPES, *LARGE))
    result = {
        "checks": ledger.checks,
        "different": ledger.different[:20],
        "bases": {recipe.name: differing_bases(device, recipe) for recipe in (METIS, CENTRED)},
    }
    print(json.dumps(result))
    return 1 if ledger.different else 0


if __name__ == "__main__":
    sys.exit(main())
