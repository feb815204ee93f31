"""Weights between plain matrices and trained factors: the same function before and after, from any layout.

Oracles: logits and validation losses of the checkpoint that was converted, and its weights after a way there
and back. One run makes the source, at TP=2; everything else is one process.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from metis.errors import CheckpointError, ConfigError
from metis.training.weight_conversion import Conversion, Report, plan_conversion
from tests._distributed import run_ranks, use_fast_checkpoint_queue
from tests.integration._trainer import (
    REPOSITORY,
    data_options,
    environment,
    read_metrics,
    run_case,
    write_data,
)

PRESERVED = 1e-6  # relative; worst measured 3e-7 of logits, 5e-9 of a loss, 2e-8 of a weight
BF16_PRESERVED = 2.0**-8  # of a weight, rounded to bf16; worst measured 1.3e-3
FP4_NOISE = 0.5  # of logits, relative, when the new recipe quantises; measured 0.1
TOKEN_IDS = [1, 50, 200, 3, 17, 17, 90, 254]
LINEARS = 16  # four in each of four blocks; the default policy leaves out the last block


def _run(line: str) -> None:
    outcome = run_case(int(torch.distributed.get_world_size()), line)
    assert not outcome.error, outcome.error


def _make_source(_rank: int, _world_size: int, folder: str, data: str) -> None:
    """Two steps at TP=2: recipe bf16 in fp32; metis with bf16 parameters and a basis per rank, not to be
    read.
    """
    use_fast_checkpoint_queue()
    options = f"{data} --train-iters 2 --eval-iters 0 --tensor-model-parallel-size 2 --save-interval 2"
    _run(f"{options} --sequence-parallel --save {folder}/plain")
    _run(f"{options} --bf16 --recipe {folder}/local.json --save {folder}/plain_bf16")


def _weights(load: str) -> dict[str, torch.Tensor]:
    """Return all stored tensors of the latest checkpoint, whole, by key."""
    from megatron.core import dist_checkpointing

    from metis.training.retention import find_checkpoint

    with contextlib.redirect_stdout(io.StringIO()):
        return dist_checkpointing.load_plain_tensors(str(find_checkpoint(load, None)[0]))


def _logits(load: str, **source: Any) -> torch.Tensor:
    from metis.training.generation import Source, loaded_model

    with loaded_model(Source(load=load, device="cpu", **source)) as model:
        return model.logits(TOKEN_IDS)


def _convert_all(_rank: int, _world_size: int, folder: str, data: str) -> dict[str, Any]:
    """Make every conversion and what is compared of it; one engine at a time in one process."""
    from metis.training.weight_conversion import convert

    use_fast_checkpoint_queue()
    ways = {
        "factored": ("plain", "bf16_reparametrised", {}),
        "paper": ("plain", "metis_paper", {"policy": "all"}),
        "again": ("paper", f"{folder}/rank32.json", {"policy": "all"}),
        "back": ("factored", "bf16", {}),
        "merged": ("paper", "metis", {}),
        "factored_bf16": ("plain_bf16", "bf16_reparametrised", {}),
        "back_bf16": ("factored_bf16", "nvfp4", {}),
    }
    reports = {
        name: convert(Conversion(load=f"{folder}/{source}", save=f"{folder}/{name}", recipe=recipe, **more))
        for name, (source, recipe, more) in ways.items()
    }
    evaluate = f"{data} --skip-train --eval-iters 2 --eval-interval 1 --finetune"
    for name, recipe in (("plain", "bf16"), ("factored", "bf16_reparametrised"), ("merged", "bf16")):
        _run(f"{evaluate} --load {folder}/{name} --recipe {recipe} --metrics-file {folder}/{name}.jsonl")
    shared = f"{data} --eval-iters 0 --recipe bf16_reparametrised --load {folder}/factored"
    _run(f"{shared} --finetune --train-iters 1 --metrics-file {folder}/trained.jsonl")
    _run(f"{shared} --no-load-optim --train-iters 3 --metrics-file {folder}/continued.jsonl")
    names = ("plain", "factored", "paper", "again", "back", "merged")
    return {
        "reports": reports,
        "weights": {name: _weights(f"{folder}/{name}") for name in (*names, "plain_bf16", "back_bf16")},
        "logits": {name: _logits(f"{folder}/{name}") for name in names},
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("conversion")
    data = f"{data_options(write_data(folder / 'text'))} --data-cache-path {folder}/cache"
    (folder / "rank32.json").write_text(
        json.dumps(
            {"base": "bf16_reparametrised", "name": "rank32", "reparametrisation": {"rank": {"fixed": 32}}}
        )
    )
    (folder / "local.json").write_text(
        json.dumps({"base": "metis", "name": "local", "basis": {"tp_mode": "local"}})
    )
    run_ranks(_make_source, 2, str(folder), data, timeout=300.0)
    found = run_ranks(_convert_all, 1, str(folder), data, timeout=300.0)[0]
    return {**found, "folder": folder, "data": data}


def _relative(actual: torch.Tensor, exact: torch.Tensor) -> float:
    return float((actual.double() - exact.double()).norm() / exact.double().norm())


# --- The function and the weights ------------------------------------------------------------


@pytest.mark.parametrize("name", ["factored", "again", "back"])
def test_logits_are_those_of_the_source(made: dict[str, Any], name: str):
    assert _relative(made["logits"][name], made["logits"]["plain"]) < PRESERVED


def test_the_new_recipe_computes_in_the_result(made: dict[str, Any]):
    """metis_paper and metis quantise, so that their logits differ, but they belong to the same weights."""
    for name in ("paper", "merged"):
        assert PRESERVED < _relative(made["logits"][name], made["logits"]["plain"]) < FP4_NOISE


def test_first_validation_losses_agree_end_to_end(made: dict[str, Any]):
    """Plain run, the same weights as factors under --finetune, and merged again by way of metis_paper."""
    plain, factored, merged = (
        read_metrics(made["folder"] / f"{name}.jsonl", "validation")[0]["validation_loss"]
        for name in ("plain", "factored", "merged")
    )
    assert factored == pytest.approx(plain, rel=PRESERVED) and merged == pytest.approx(plain, rel=PRESERVED)


def test_a_run_starts_anew_or_goes_on_from_the_result(made: dict[str, Any]):
    assert [line["iteration"] for line in read_metrics(made["folder"] / "trained.jsonl")] == [1]
    continued = read_metrics(made["folder"] / "continued.jsonl")
    assert [line["iteration"] for line in continued] == [3]
    assert continued[0]["consumed_tokens"] == 3 * 4 * 32, "the third batch, not the first again"


@pytest.mark.parametrize(
    ("source", "result", "tolerance"),
    [("plain", "back", PRESERVED), ("plain_bf16", "back_bf16", BF16_PRESERVED)],
)
def test_weights_come_back(made: dict[str, Any], source: str, result: str, tolerance: float):
    before, after = made["weights"][source], made["weights"][result]
    names = [n for n, value in after.items() if isinstance(value, torch.Tensor) and ".bases." not in n]
    assert len(names) > 8 and all(before[name].dtype == after[name].dtype for name in names)
    for name in names:
        if "linear" in name and name.endswith("weight"):
            assert _relative(after[name], before[name]) < tolerance, name
            # The default policy leaves the last block as it is, bit by bit.
            assert torch.equal(after[name][-1], before[name][-1])
        elif "embeddings" in name or "output_layer" in name:
            rows = min(len(before[name]), len(after[name]))  # padding depends on the layout
            assert rows >= 256 and torch.equal(after[name][:rows], before[name][:rows])
        else:
            assert torch.equal(after[name], before[name]), name


def test_factors_are_the_leading_singular_directions(made: dict[str, Any]):
    plain, paper = made["weights"]["plain"], made["weights"]["paper"]
    key = "decoder.layers.mlp.linear_fc1"
    whole = plain[f"{key}.weight"][1].double()
    u, s, v = (paper[f"{key}.{name}.layer_1"].double() for name in ("u", "s", "v"))
    assert _relative(s, torch.linalg.svdvals(whole)[:16]) < PRESERVED
    assert _relative((u * s) @ v.T + paper[f"{key}.weight"][1].double(), whole) < PRESERVED
    assert float(torch.linalg.matrix_norm(paper[f"{key}.weight"][1].double(), 2)) < float(s[-1]) * 1.001


def test_the_report_counts_and_measures(made: dict[str, Any]):
    reports: dict[str, Report] = made["reports"]
    counts = {n: (r.num_split, r.num_merged, r.num_split_again) for n, r in reports.items()}
    assert counts["factored"] == counts["factored_bf16"] == (LINEARS - 4, 0, 0)
    assert counts["paper"] == (LINEARS, 0, 0) and counts["again"] == (0, 0, LINEARS)
    assert counts["back"] == (0, LINEARS - 4, 0) and counts["merged"] == (0, LINEARS, 0)
    assert {report.iteration for report in reports.values()} == {2}
    for name, report in reports.items():
        limit = BF16_PRESERVED if name.endswith("bf16") else PRESERVED
        assert 0 < report.largest_weight_error < limit, name


def test_the_result_describes_itself(made: dict[str, Any]):
    """As a run with the new recipe would: nothing temporary, one rank, no optimizer."""
    folder = made["folder"]
    source = json.loads((folder / "plain" / "run_config.json").read_text())
    for name, recipe, policy in (("factored", "bf16_reparametrised", None), ("paper", "metis_paper", "all")):
        text = (folder / name / "run_config.json").read_text()
        config = json.loads(text)
        assert "metis_convert" not in text
        assert config["recipe"]["name"] == config["training"]["recipe"] == recipe
        assert config["training"]["policy"] == policy
        assert (config["policy"] == source["policy"]) == (policy is None)
        assert len(config["factored_linears"]) == LINEARS - 4 * (policy is None)
        assert set(config["factored_linears"].values()) == {16}
        assert config["parallel"]["tensor_model_parallel_size"] == 1
        assert config["optimizer_sharding"] == "none" and config["iteration"] == 2
        for section in ("model", "training"):
            for key, value in source[section].items():
                if key not in ("recipe", "policy", "padded_vocab_size"):
                    assert config[section][key] == value, (name, section, key)


def test_bases_of_single_ranks_do_not_load_at_another_number_of_ranks(made: dict[str, Any]):
    """The source with such bases was converted, since weights need none; a run that goes on needs them."""
    folder = made["folder"]
    outcome = run_case(
        1, f"{made['data']} --load {folder}/plain_bf16 --bf16 --recipe {folder}/local.json --train-iters 3"
    )
    assert "must be loaded at tensor_model_parallel_size 2, received 1; use that size, or" in outcome.error


# --- The command and its mistakes --------------------------------------------------------------


def _command(*options: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(REPOSITORY / "tools" / "convert_weights.py"), *options],
        env=environment(PYTHONPATH=str(REPOSITORY)),
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_command_converts_and_reports(made: dict[str, Any]):
    folder = made["folder"]
    done = _command(
        "--load",
        f"{folder}/factored",
        "--save",
        f"{folder}/by_command",
        "--recipe",
        "bf16",
        "--ckpt-step",
        "2",
    )
    assert done.returncode == 0, done.stderr
    error = f"{made['reports']['back'].largest_weight_error:.1e}"
    assert done.stdout == (
        "iteration 2: 0 linears split, 12 merged, 0 split again, largest relative change of a weight "
        f"{error}; "
        f"saved to {folder}/by_command\n"
    )
    assert (folder / "by_command" / "latest_checkpointed_iteration.txt").read_text().strip() == "2"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"load": "{folder}/nothing"}, "--load: must hold a checkpoint, received none in"),
        ({"ckpt_step": 9}, "complete checkpoints are 2"),
        ({"recipe": "metsi"}, "did you mean 'metis'"),
        ({"save": "{folder}/plain"}, "--save: must be a new or empty directory"),
        ({"save": "{folder}/rank32.json"}, "--save: must be a new or empty directory"),
        (
            {"recipe": "metis"},
            r"--recipe: must give at least one linear another form, .*\(every weight plain\)",
        ),
        ({"load": "{folder}/factored", "recipe": "metis_paper"}, r"\(12 linears split into factors\)"),
        ({"policy": "{folder}/last.json"}, r"--recipe: must give at least one linear another form"),
        ({"policy": "{folder}/none.json"}, "--policy: must name a readable file"),
    ],
)
def test_a_mistake_is_refused_before_torch_is_needed(
    made: dict[str, Any], tmp_path: Path, changes: dict[str, Any], message: str
):
    folder = made["folder"]
    (folder / "last.json").write_text(json.dumps({"rules": [{"match": "*", "recipe": "bf16"}]}))
    values = {"load": f"{folder}/plain", "save": f"{folder}/new", "recipe": "metis_paper", **changes}
    values = {k: v.format(folder=folder) if isinstance(v, str) else v for k, v in values.items()}
    with pytest.raises((CheckpointError, ConfigError), match=message):
        plan_conversion(Conversion(**values), tmp_path)
    assert not (folder / "new").exists()


def test_a_foreign_checkpoint_and_several_processes_are_refused(
    made: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = made["folder"]
    shutil.copytree(f"{folder}/plain", tmp_path / "foreign")
    for path in (tmp_path / "foreign").rglob("run_config.json"):
        path.unlink()
    request = {"save": str(tmp_path / "new"), "recipe": "metis_paper"}
    with pytest.raises(CheckpointError, match=r"run_config\.json: must describe model, recipe and policy"):
        plan_conversion(Conversion(load=str(tmp_path / "foreign"), **request), tmp_path)
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="world size: must be 1"):
        plan_conversion(Conversion(load=f"{folder}/plain", **request), tmp_path)


def test_a_batch_job_without_srun_is_one_process(
    made: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("RANK", raising=False)
    for name, value in (("SLURM_PROCID", "0"), ("SLURM_NTASKS", "8")):
        monkeypatch.setenv(name, value)
    request = Conversion(load=f"{made['folder']}/plain", save=str(tmp_path / "new"), recipe="metis_paper")
    plan_conversion(request, tmp_path)


def test_the_command_ends_a_mistake_in_one_line(tmp_path: Path):
    done = _command("--load", str(tmp_path), "--save", str(tmp_path / "x"), "--recipe", "metis_paper")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"error: --load: must hold a checkpoint, received none in {tmp_path}\n"
