"""`--recipe-schedule`: what a file says, at which step a learning rate is reached, what a linear carries
over.

Oracles: recipes written out by hand; megatron-core's own scheduler and batch calculator, walked step by step;
for a change of recipe the bases before it, and `torch.nn.functional.linear` for a phase in bf16.
"""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from metis.config import RankConfig, Recipe
from metis.errors import CheckpointError, ConfigError, ShapeError
from metis.nn import MetisLinear, OperandBasis
from metis.recipes import BF16, METIS, METIS_PAPER, NVFP4, NVFP4_FORWARD_BF16, with_changes
from metis.schedule import Phase, Schedule, read_schedule, schedule_of
from metis.training import retention
from metis.training.accounting import resolved_config
from metis.training.arguments import parse_args, validate_args
from metis.training.learning_rate import (
    SampleCount,
    num_training_steps,
    planned_learning_rate,
    schedule_lengths,
    step_at_lr_fraction,
)
from metis.training.run_config import RUN_CONFIG_NAME, build_run_config, check_compatible, to_json

TINY = "--preset tiny --mock-data --vocab-size 1000 --micro-batch-size 2 --lr 1e-3"
RATE_TOLERANCE = 1e-15  # relative; the same formulas in the same order: 0 seen


def _file(folder: Path, phases: Any, name: str = "schedule.json") -> str:
    path = folder / name
    path.write_text(json.dumps(phases if isinstance(phases, dict) else {"phases": phases}))
    return str(path)


def _read(folder: Path, phases: Any, run_recipe: Recipe = METIS) -> Schedule:
    return read_schedule(_file(folder, phases), run_recipe, lambda fraction: round(1000 * (1 - fraction)))


def _resolve(options: str, world_size: int = 1) -> Namespace:
    args = parse_args([*TINY.split(), *options.split()])
    validate_args(args, world_size)
    return args


# --- the file ---------------------------------------------------------------------------------------------


def test_phases_build_on_each_other(tmp_path: Path) -> None:
    schedule = _read(
        tmp_path,
        [
            {"at_step": 100, "change": {"name": "b", "basis": {"refresh_interval_steps": 4}}},
            {"at_step": 200, "change": {"fprop_input": {"split": None}, "wgrad_input": {"split": None}}},
            {"at_lr_fraction": 0.5, "recipe": "nvfp4", "change": {"amax_scope": "te"}},
            {"at_lr_fraction": 0.25, "recipe": "bf16"},
        ],
    )
    second = replace(METIS, name="b", basis=replace(METIS.basis, refresh_interval_steps=4))
    unsplit = replace(METIS.fprop_input, split=None)
    third = replace(second, name="b+2", fprop_input=unsplit, wgrad_input=unsplit)
    assert schedule.start_steps == [0, 100, 200, 500, 750]
    recipes = [METIS, second, third, replace(NVFP4, name="nvfp4+3", amax_scope="te"), BF16]
    assert [phase.recipe for phase in schedule.phases] == recipes
    assert Schedule.from_dict(json.loads(json.dumps(schedule.to_dict()))) == schedule
    assert "b from step 100" in schedule.describe()


def test_the_first_phase_may_replace_or_change_the_runs_recipe(tmp_path: Path) -> None:
    first = _read(
        tmp_path, [{"at_step": 0, "recipe": "nvfp4"}, {"at_step": 5, "change": {"name": "x"}}], BF16
    )
    assert [phase.recipe for phase in first.phases] == [NVFP4, replace(NVFP4, name="x")]
    changed = _read(tmp_path, [{"at_step": 0, "change": {"amax_scope": "te"}}], NVFP4)
    assert changed.phases == (Phase(start_step=0, recipe=replace(NVFP4, name="nvfp4+0", amax_scope="te")),)


def test_yaml_and_recipe_files(tmp_path: Path) -> None:
    recipe = _file(tmp_path, {"base": "metis", "basis": {"oversample": 4}}, "mine.json")
    path = tmp_path / "s.yaml"
    path.write_text(f"phases:\n  - {{at_step: 7, recipe: {recipe}}}\n")
    schedule = read_schedule(str(path), BF16, lambda fraction: None)
    assert [phase.recipe.name for phase in schedule.phases] == ["bf16", "mine"]
    assert schedule.phases[1].recipe.basis.oversample == 4


def test_a_step_belongs_to_the_phase_that_began_last() -> None:
    schedule = Schedule(phases=(Phase(start_step=0, recipe=METIS), Phase(start_step=3, recipe=BF16)))
    assert [schedule.recipe_at(step).name for step in range(5)] == ["metis", "metis", "metis", "bf16", "bf16"]
    assert [schedule.index_at(step) for step in range(5)] == [0, 0, 0, 1, 1]
    assert [schedule.index_after(steps) for steps in range(6)] == [0, 0, 0, 0, 1, 1]
    assert schedule_of(None, "nvfp4").recipe_at(10**9) == NVFP4


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ({"phase": []}, r"\.phase: is not a known setting; did you mean 'phases'\?"),
        ({"phases": []}, r"must hold one key, 'phases', with a list"),
        ([3], r"phases\[0\]: must be a mapping of settings, received 3"),
        ([{"at_stpe": 3}], r"phases\[0\]\.at_stpe: is not a known setting; did you mean 'at_step'\?"),
        ([{"recipe": "bf16"}], r"phases\[0\]: must say either at_step or at_lr_fraction"),
        (
            [{"at_step": 1, "at_lr_fraction": 0.5, "recipe": "bf16"}],
            "must say either at_step or at_lr_fraction",
        ),
        ([{"at_step": 1}], r"phases\[0\]: must say what applies: a recipe, a change or both"),
        ([{"at_step": -1, "recipe": "bf16"}], r"at_step: must be a step number from 0 on, received -1"),
        ([{"at_step": True, "recipe": "bf16"}], r"at_step: must be a step number from 0 on, received True"),
        ([{"at_step": 1.5, "recipe": "bf16"}], r"at_step: must be a step number from 0 on, received 1\.5"),
        ([{"at_lr_fraction": 0, "recipe": "bf16"}], r"at_lr_fraction: must lie in \(0, 1\].*received 0"),
        ([{"at_lr_fraction": 50, "recipe": "bf16"}], r"at_lr_fraction: must lie in \(0, 1\].*received 50"),
        (
            [{"at_step": 600, "recipe": "bf16"}, {"at_lr_fraction": 0.5, "recipe": "nvfp4"}],
            r"phases\[1\]: must begin after the phase before it \(step 600\), received 500",
        ),
        (
            [{"at_step": 6, "recipe": "bf16"}, {"at_step": 6, "recipe": "nvfp4"}],
            r"phases\[1\]: must begin after the phase before it \(step 6\), received 6",
        ),
        ([{"at_step": 1, "recipe": "nvpf4"}], r"phases\[0\]\.recipe: --recipe: .*did you mean 'nvfp4'"),
        ([{"at_step": 1, "change": {}}], r"change: must be a mapping of recipe settings, received \{\}"),
        (
            [{"at_step": 1, "change": {"fprop_inptu": {}}}],
            r"phases\[0\]\.change\.fprop_inptu: is not a known setting; did you mean 'fprop_input'\?",
        ),
        (
            [{"at_step": 1, "change": {"fprop_input": {"split": {"rank": {"fixed": 32}}}}}],
            r"phases\[0\]\.change: recipe 'metis\+1': wgrad_input\.split: must equal fprop_input\.split",
        ),
        (
            [{"at_step": 1, "recipe": "metis_paper"}],
            r"phases\[0\]: must keep the trained parameters .*received recipe 'metis_paper' after 'metis'",
        ),
    ],
)
def test_mistakes_name_the_entry(tmp_path: Path, phases: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _read(tmp_path, phases)


def test_an_unreachable_learning_rate_is_an_error(tmp_path: Path) -> None:
    path = _file(tmp_path, [{"at_lr_fraction": 0.1, "recipe": "bf16"}])
    with pytest.raises(ConfigError, match=r"must be reached .*which never falls to 0\.1 of its maximum"):
        _resolve(f"--recipe-schedule {path} --train-iters 20 --min-lr 2e-4 --lr-decay-style linear")
    with pytest.raises(ConfigError, match="--train-iters: or --train-samples must be given"):
        _resolve(f"--recipe-schedule {path} --print-config")


# --- the learning rate ------------------------------------------------------------------------------------

ITERATIONS = "--train-iters 60 --global-batch-size 8"
SAMPLES = "--train-samples 480 --global-batch-size 8"
SCHEDULES = [
    f"{ITERATIONS} --lr-decay-style constant --lr-warmup-iters 5",
    f"{ITERATIONS} --lr-decay-style linear",
    f"{ITERATIONS} --lr-decay-style linear --lr-decay-iters 40 --min-lr 1e-4 --lr-warmup-init 1e-4 "
    "--lr-warmup-iters 10",
    f"{ITERATIONS} --lr-decay-style cosine --lr-warmup-fraction 0.13 --min-lr 1e-5",
    f"{ITERATIONS} --lr-decay-style inverse-square-root --lr-warmup-iters 4 --min-lr 3e-4",
    f"{SAMPLES} --lr-decay-style cosine --lr-warmup-samples 50",
    f"{SAMPLES} --lr-decay-style linear --rampup-batch-size 2 2 100 --lr-decay-samples 400",
    *(
        f"{ITERATIONS} --lr-decay-style WSD --lr-wsd-decay-iters 20 --lr-wsd-decay-style {style}"
        for style in ("linear", "cosine", "exponential", "minus_sqrt")
    ),
]


def _engine_rates(args: Namespace, num_steps: int) -> list[tuple[int, float]]:
    """Return (samples read before, learning rate) of every step, from megatron-core itself."""
    from megatron.core.num_microbatches_calculator import RampupBatchsizeNumMicroBatchesCalculator

    from metis.training.optimizer import build_scheduler

    optimizer = SimpleNamespace(param_groups=[{"params": [1]}])
    scheduler = build_scheduler(args, optimizer)
    batches = None
    if args.rampup_batch_size:
        start, increment, samples = args.rampup_batch_size
        batches = RampupBatchsizeNumMicroBatchesCalculator(
            args.global_batch_size, args.micro_batch_size, 1, False, 1, start, increment, samples
        )
    rates, consumed = [], 0
    for _ in range(num_steps):
        rates.append((consumed, optimizer.param_groups[0]["lr"]))
        size = args.global_batch_size
        if batches is not None:
            batches.update(consumed, False)
            size = batches.get_current_global_batch_size()
        consumed += size
        scheduler.step(increment=size)
    return rates


@pytest.mark.parametrize("options", SCHEDULES)
def test_planned_rates_and_batches_are_the_engines(options: str) -> None:
    args = _resolve(options)
    samples, lengths = SampleCount(args), schedule_lengths(args)
    for step, (consumed, rate) in enumerate(_engine_rates(args, 90)):
        assert samples.before(step) == consumed
        assert abs(planned_learning_rate(args, lengths, consumed) - rate) <= RATE_TOLERANCE * args.lr


@pytest.mark.parametrize("options", SCHEDULES)
@pytest.mark.parametrize("fraction", [1.0, 0.9, 0.5, 0.31, 0.1, 0.001])
def test_a_fraction_is_the_first_step_after_warmup_that_has_it(options: str, fraction: float) -> None:
    args = _resolve(options)
    warmup = schedule_lengths(args).warmup
    wanted = [
        step
        for step, (consumed, rate) in enumerate(_engine_rates(args, 400))
        if consumed >= warmup and rate <= fraction * args.lr * (1 + 1e-12)
    ]
    assert step_at_lr_fraction(args, fraction) == (wanted[0] if wanted else None)


def test_an_exact_fraction_counts_as_reached() -> None:
    args = _resolve("--train-iters 10 --lr-decay-style linear")
    assert [step_at_lr_fraction(args, k / 10) for k in range(1, 11)] == list(range(9, -1, -1))


def test_millions_of_steps_take_no_time() -> None:
    args = _resolve("--train-samples 4000000000 --global-batch-size 256 --rampup-batch-size 64 64 1000000")
    assert step_at_lr_fraction(args, 0.5) == pytest.approx(4e9 / 512, rel=1e-3)
    assert num_training_steps(args) == pytest.approx(4e9 / 256, rel=1e-3)


# --- arguments and checkpoints ----------------------------------------------------------------------------


def test_arguments_hold_the_resolved_phases(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _file(tmp_path, [{"at_lr_fraction": 0.5, "recipe": "bf16"}, {"at_step": 30, "recipe": "nvfp4"}])
    args = _resolve(f"--recipe metis --recipe-schedule {path} --train-iters 20 --lr-decay-style linear")
    assert args.resolved_schedule["start_steps"] == [0, 10, 30]
    assert args.resolved_recipe["name"] == "metis"
    assert "the phase from step 30 on does not begin within the 20 iterations" in capsys.readouterr().err
    shown = resolved_config(args)["recipe_schedule"]
    assert [(phase["start_step"], phase["recipe"]["name"]) for phase in shown] == [
        (0, "metis"),
        (10, "bf16"),
        (30, "nvfp4"),
    ]
    assert [phase["num_quantized_linears"] for phase in shown] == [12, 0, 12]
    assert [
        phase["start_step"] for phase in resolved_config(_resolve("--train-iters 1"))["recipe_schedule"]
    ] == [0]


def test_every_phase_is_checked_against_the_model(tmp_path: Path) -> None:
    path = _file(tmp_path, [{"at_step": 5, "recipe": "fp8_blocks"}])
    with pytest.raises(ConfigError, match=r"recipe fp8_blocks\): must have .* divisible by 128"):
        _resolve(f"--recipe nvfp4 --recipe-schedule {path} --train-iters 20 --seq-length 32")
    path = _file(tmp_path, [{"at_step": 5, "recipe": "nvfp4"}])
    with pytest.raises(ConfigError, match="transformer_engine must not be combined with --recipe-schedule"):
        _resolve(f"--recipe-schedule {path} --train-iters 20 --gemm-backend transformer_engine --bf16")
    with pytest.raises(ConfigError, match=r"--spec: replaces the layers .* received recipe nvfp4"):
        _resolve(f"--recipe-schedule {path} --train-iters 20 --spec a b")
    with pytest.raises(ConfigError, match=r"--recipe-schedule: must name a readable file"):
        _resolve(f"--recipe-schedule {tmp_path}/none.yaml --train-iters 20")


def _stored(args: Namespace, iteration: int) -> dict[str, Any]:
    return json.loads(to_json(build_run_config(args, iteration, "none", versions={})))


def test_a_resumed_run_needs_the_same_phases(tmp_path: Path) -> None:
    def scheduled(step: int, recipe: str) -> Namespace:
        path = _file(tmp_path, [{"at_step": step, "recipe": recipe}], f"{step}{recipe}.json")
        return _resolve(f"--recipe metis --recipe-schedule {path} --train-iters 20")

    args = scheduled(5, "nvfp4")
    assert [_stored(args, k)["recipe"]["name"] for k in (0, 5, 6)] == ["metis", "metis", "nvfp4"]
    for k in (0, 5, 6):
        check_compatible("ckpt", _stored(args, k), args, finetune=False)
    plain = _resolve("--recipe metis --train-iters 20")
    for stored, wanted, message in (
        (args, scheduled(6, "nvfp4"), r"schedule: start_steps stored \[0, 5\], requested \[0, 6\]"),
        (args, scheduled(5, "bf16"), r"another recipe from step 5 on: .*stored .*requested None"),
        (args, plain, r"schedule: start_steps stored \[0, 5\], requested \[0\]"),
        (plain, args, r"schedule: start_steps stored \[0\], requested \[0, 5\]"),
    ):
        with pytest.raises(CheckpointError, match=message):
            check_compatible("ckpt", _stored(stored, 6), wanted, finetune=False)
        check_compatible("ckpt", _stored(stored, 6), wanted, finetune=True)
    evaluation = _resolve("--recipe nvfp4 --train-iters 20 --skip-train")
    check_compatible("ckpt", _stored(args, 6), evaluation, finetune=False)
    with pytest.raises(CheckpointError, match="another recipe: "):
        check_compatible("ckpt", _stored(args, 5), evaluation, finetune=False)


def test_one_phase_is_the_run_without_a_schedule(tmp_path: Path) -> None:
    path = _file(tmp_path, [{"at_step": 0, "recipe": "nvfp4"}])
    single, plain = (
        _resolve(f"--recipe-schedule {path} --train-iters 2"),
        _resolve("--recipe nvfp4 --train-iters 2"),
    )
    check_compatible("ckpt", _stored(single, 1), plain, finetune=False)
    check_compatible("ckpt", _stored(plain, 1), single, finetune=False)


def test_checkpoint_arguments_bring_the_schedule_unless_a_recipe_is_given(tmp_path: Path) -> None:
    path = _file(tmp_path, [{"at_step": 5, "recipe": "nvfp4"}])
    first = _resolve(f"--recipe metis --recipe-schedule {path} --train-iters 20")
    directory = tmp_path / "iter_0000004"
    directory.mkdir()
    for name in (".metadata", retention.METADATA_NAME):
        (directory / name).touch()
    (tmp_path / retention.TRACKER_NAME).write_text("4\n")
    (directory / RUN_CONFIG_NAME).write_text(json.dumps(_stored(first, 4)))
    options = f"--load {tmp_path} --use-checkpoint-args --train-iters 20"
    assert _resolve(options).resolved_schedule == first.resolved_schedule
    assert _resolve(f"{options} --recipe bf16").resolved_schedule is None


# --- a linear that changes its recipe ---------------------------------------------------------------------

K, N, M = 96, 64, 128
ORTHONORMAL_IN_BF16 = 0.01  # |V^T V - I| of columns rounded to bf16; 0.0020 seen
NEAR_OPTIMUM = 1.25  # times what the best basis of these tokens leaves over; 1.16 seen
BF16_NOISE = 0.005  # share that the rounding of V leaves over; 0.0039 seen for 64 columns
LEADING_COLUMNS = 1.05  # times what a basis of that rank from the start leaves over; 1.008 seen


def _ranks(rank: int, recipe: Recipe = METIS) -> Recipe:
    split = {"split": {"rank": {"fixed": rank}}}
    cells = (
        "fprop_input",
        "wgrad_input",
        "fprop_weight",
        "dgrad_weight",
        "dgrad_grad_output",
        "wgrad_grad_output",
    )
    return with_changes(recipe, {"name": f"rank{rank}"} | dict.fromkeys(cells, split), "test")


def _inputs(step: int) -> torch.Tensor:
    """Return tokens with 40 directions of falling energy, the same for every step, and a little noise."""
    torch.manual_seed(0)
    directions = torch.linalg.qr(torch.randn(K, 40))[0] * 0.85 ** torch.arange(40)
    torch.manual_seed(1 + step)
    return torch.randn(M, 40) @ directions.T + 1e-3 * torch.randn(M, K)


def _step(layer: MetisLinear, step: int) -> torch.Tensor:
    layer.zero_grad()
    y = layer(_inputs(step))
    y.square().mean().backward()
    layer.after_step()
    return y.detach()


def _trained(recipe: Recipe | str, num_steps: int) -> MetisLinear:
    torch.manual_seed(3)
    layer = MetisLinear(K, N, recipe=recipe)
    for step in range(num_steps):
        _step(layer, step)
    return layer


def _basis(layer: MetisLinear, operand: str = "input") -> OperandBasis:
    basis = layer.core.bases[operand]
    assert isinstance(basis, OperandBasis)
    return basis


def _left_over(layer: MetisLinear, step: int = 99) -> float:
    """Return the share of the tokens' norm that the input basis does not hold."""
    v = _basis(layer).active
    assert v is not None
    x, v = _inputs(step).double(), v.double()
    return float((x - x @ v @ v.T).norm() / x.norm())


@pytest.mark.parametrize(("before", "after"), [(8, 16), (8, 9), (8, 64), (16, 8), (32, 4), (64, 8)])
def test_another_rank_is_in_use_at_once_and_converges(before: int, after: int) -> None:
    layer = _trained(_ranks(before), 4)
    was = _left_over(layer)
    layer.set_recipe(_ranks(after))
    for operand, size in (("input", K), ("weight", K), ("grad_output", N)):
        state = _basis(layer, operand).state
        v = _basis(layer, operand).active.double()
        assert v.shape == (size, min(after, size)) and state.v.shape == (size, min(after + 8, size))
        assert (state.phase, state.row_count, state.num_refreshes) == ("cold", 0, 0)
        assert (v.T @ v - torch.eye(v.shape[1])).abs().max() < ORTHONORMAL_IN_BF16
    if after > before:
        assert _left_over(layer) <= was * 1.001
    for step in range(4, 12):  # 64 columns wait three steps for their rows
        _step(layer, step)
    best = torch.linalg.svdvals(_inputs(99).double())
    optimum = float(best[after:].norm() / best.norm())
    assert _basis(layer).state.phase == "warm" and _basis(layer).state.rank == after
    assert _left_over(layer) <= NEAR_OPTIMUM * optimum + BF16_NOISE


def test_leading_directions_survive_a_smaller_rank() -> None:
    """The eight leading of 32 columns are nearly the best eight: power steps keep the strongest first."""
    layer, fresh = _trained(_ranks(32), 4), _trained(_ranks(8), 4)
    layer.set_recipe(_ranks(8))
    assert _left_over(layer) <= LEADING_COLUMNS * _left_over(fresh)


def test_settings_that_leave_the_shape_keep_the_basis() -> None:
    basis = {"refresh_interval_steps": 2, "row_sample_fraction": 0.5, "num_pinned_rows": 0, "tp_mode": "fast"}
    changed = with_changes(METIS, {"name": "x", "basis": basis}, "test")
    layer = _trained(METIS, 3)
    state = _basis(layer).state
    layer.set_recipe(changed)
    assert _basis(layer).state is state and _basis(layer).config.refresh_interval_steps == 2
    _step(layer, 3)
    assert _basis(layer).state.last_refresh_step == 3


def test_what_cannot_go_on_starts_cold() -> None:
    local = with_changes(METIS, {"name": "x", "basis": {"tp_mode": "local"}}, "test")
    ordered = with_changes(METIS, {"name": "y", "spectral_learning_rate": {}}, "test")
    for recipe, fresh in ((local, ["input", "weight", "grad_output"]), (ordered, ["grad_output"])):
        layer = _trained(METIS, 3)
        layer.set_recipe(recipe)
        phases = {name: _basis(layer, name).state.phase for name in layer.core.bases}
        assert phases == {name: "empty" if name in fresh else "warm" for name in phases}
        _step(layer, 3)
        assert _basis(layer, "grad_output").active is not None
    layer = _trained(ordered, 3)
    layer.set_recipe(METIS)
    assert _basis(layer, "grad_output").state.phase == "warm"


def test_centring_drops_rows_that_were_sketched_without_it() -> None:
    split = replace(METIS.fprop_input.split, mean_first=True)
    x = replace(METIS.fprop_input, split=split)
    centred = replace(
        METIS, name="centred", fprop_input=x, wgrad_input=replace(METIS.wgrad_input, split=split)
    )
    layer = _trained(METIS, 3)
    basis = _basis(layer)
    basis.state = replace(basis.state, row_count=5, gram=torch.ones_like(basis.state.gram))
    v = basis.state.v
    layer.set_recipe(centred)
    state = _basis(layer).state
    assert state.row_count == 0 and not state.gram.any() and torch.equal(state.v, v)


def test_a_split_gained_begins_cold_and_a_split_lost_is_forgotten() -> None:
    layer = _trained("nvfp4_direct", 2)
    assert not layer.core.bases
    twin = _trained("nvfp4_direct", 2)
    layer.set_recipe(replace(METIS, fprop_weight=NVFP4.fprop_weight, dgrad_weight=NVFP4.dgrad_weight))
    assert list(layer.core.bases) == ["input", "grad_output"]
    assert all(_basis(layer, name).active is None for name in layer.core.bases)
    _step(layer, 2), _step(twin, 2)
    assert all(_basis(layer, name).active is not None for name in layer.core.bases)
    layer.set_recipe("nvfp4")
    assert not layer.core.bases and not any("bases" in name for name in layer.state_dict())


@pytest.mark.parametrize("recipe", ["metis", "nvfp4"])
def test_healing_in_bf16(recipe: str) -> None:
    """Forward healed: y is the exact product, gradients are not; both healed: torch's own linear."""
    layer = _trained(recipe, 3)
    x = _inputs(3)
    exact = torch.nn.functional.linear(x, layer.weight, layer.bias)
    assert not torch.allclose(layer(x), exact, rtol=1e-3, atol=1e-3)
    layer.set_recipe(NVFP4_FORWARD_BF16)
    torch.testing.assert_close(layer(x), exact)
    (healed,) = torch.autograd.grad(layer(x).square().sum(), layer.weight)
    (true,) = torch.autograd.grad(exact.square().sum(), layer.weight)
    assert not torch.allclose(healed, true, rtol=1e-3, atol=1e-3 * true.abs().max())
    layer.set_recipe("bf16")
    assert torch.equal(layer(x), exact)
    layer.set_recipe("nvfp4_backward_bf16")
    (healed,) = torch.autograd.grad((layer(x) * exact.detach()).sum() * 2, layer.weight)
    torch.testing.assert_close(healed, true)
    assert not torch.allclose(layer(x), exact, rtol=1e-3, atol=1e-3)


def test_a_change_and_back_between_steps_is_no_change_without_bases() -> None:
    layer, twin = _trained("nvfp4", 2), _trained("nvfp4", 2)
    layer.set_recipe("bf16")
    layer.set_recipe("nvfp4")
    assert torch.equal(_step(layer, 2), _step(twin, 2))
    assert torch.equal(layer.weight.grad, twin.weight.grad)


def test_factors_stay_and_their_quantiser_may_change() -> None:
    layer = _trained(METIS_PAPER, 2)
    u = layer.u
    plain = with_changes(METIS_PAPER, {"name": "x", "reparametrisation": {"factor_quantizer": None}}, "test")
    before = layer(_inputs(5))
    layer.set_recipe(plain)
    assert layer.u is u and not torch.equal(layer(_inputs(5)), before)


def test_a_layer_refuses_what_it_cannot_become() -> None:
    with pytest.raises(ConfigError, match="linear: recipe: must keep the trained parameters"):
        _trained(METIS, 0).set_recipe(METIS_PAPER)
    other = replace(METIS_PAPER.reparametrisation, rank=RankConfig(fixed=8))
    with pytest.raises(ConfigError, match="must keep the trained parameters"):
        _trained("metis_paper", 0).set_recipe(
            replace(METIS_PAPER, reparametrisation=replace(other, factor_quantizer=None))
        )
    layer = _trained(METIS, 1)
    with pytest.raises(ShapeError, match="multiple of 128"):
        layer.set_recipe("fp8_blocks")
    assert layer.core.recipe == METIS


def test_a_phase_begins_without_reading_the_policy_file_again(tmp_path: Path, capsys: Any) -> None:
    """A file that is edited or removed during a run must not change or end it at the next boundary."""
    from metis.training.recipe_phases import RecipePhases

    policy = tmp_path / "policy.json"
    policy.write_text(json.dumps({"rules": [{"match": "*.linear_proj", "recipe": "bf16"}, {"match": "*"}]}))
    schedule = _file(tmp_path, [{"at_step": 2, "recipe": "nvfp4"}])
    args = _resolve(f"--train-iters 4 --recipe metis --policy {policy} --recipe-schedule {schedule}")
    phases = RecipePhases(args, [])
    policy.unlink()
    assert not phases.enter(1)
    assert phases.enter(2)
    assert phases.recipes[2]["decoder.layers.0.self_attention.linear_proj"] == BF16
    assert "phase 2 of 2" in capsys.readouterr().out
