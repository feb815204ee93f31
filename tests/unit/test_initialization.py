"""Initial weights on one rank: keyed values, shards, statistics; against megatron's rules."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metis.errors import ConfigError
from metis.mcore.initialization import (
    EMBEDDING_NAME,
    ROWS_PER_BLOCK,
    _pieces,
    copy_global_name,
    full_weight,
    global_parameter_names,
    init_std,
    initialize_parameters,
)

STD = 0.02
SEED = 1234
NAME = "decoder.layers.3.mlp.linear_fc1.weight"

# First four values of (SEED, NAME) with unit variance, numpy 2.x; a change here changes every training run.
GOLDEN = [-1.5965778827667236, -1.4989135265350342, -1.361168622970581, 0.6476982831954956]

# Standard errors allowed between a sample statistic and its expectation.
MAX_SIGMAS = 5.0


def make_config(**changes):
    values = {
        "init_method_std": STD,
        "embedding_init_method_std": 0.05,
        "num_layers": 8,
        "gated_linear_unit": True,
    }
    return SimpleNamespace(**(values | changes))


class Linear(torch.nn.Module):
    def __init__(self, out_features, in_features, dtype=torch.float32):
        super().__init__()
        self.output_size, self.input_size = out_features, in_features
        self.weight = torch.nn.Parameter(torch.full((out_features, in_features), 7.0, dtype=dtype))
        self.bias = torch.nn.Parameter(torch.full((out_features,), 7.0, dtype=dtype))


class Reparametrized(Linear):
    is_reparametrized = True

    def __init__(self, out_features, in_features):
        super().__init__(out_features, in_features)
        self.u = torch.nn.Parameter(torch.zeros(out_features, 2))
        self.received = None

    def load_full_weight(self, full):
        self.received = full


class Model(torch.nn.Module):
    def __init__(self, fc2, dtype=torch.float32):
        super().__init__()
        self.linear_fc1 = Linear(96, 32, dtype)
        self.linear_fc2 = fc2
        self.final_layernorm = torch.nn.LayerNorm(32, dtype=dtype)
        torch.nn.init.constant_(self.final_layernorm.weight, 7.0)


def test_full_weight_golden_value():
    first = full_weight(NAME, (1, 4), 1.0, SEED)[0]
    assert first.tolist() == GOLDEN


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 128])
def test_full_weight_rows_do_not_depend_on_the_number_of_rows(rows):
    padded = full_weight(NAME, (256, 24), STD, SEED)
    assert torch.equal(full_weight(NAME, (rows, 24), STD, SEED), padded[:rows])


def test_full_weight_differs_by_name_seed_and_block():
    base = full_weight(NAME, (2 * ROWS_PER_BLOCK, 16), STD, SEED)
    others = [
        full_weight(NAME.replace("3", "4"), (ROWS_PER_BLOCK, 16), STD, SEED),
        full_weight(NAME, (ROWS_PER_BLOCK, 16), STD, SEED + 1),
        base[ROWS_PER_BLOCK:],
    ]
    for other in others:
        assert (base[:ROWS_PER_BLOCK] == other).float().mean() < 0.01


def test_full_weight_statistics():
    """Mean, deviation, kurtosis and the correlation of neighbouring blocks, in standard errors."""
    weight = full_weight(NAME, (1024, 128), STD, SEED).double() / STD
    count = weight.numel()
    assert abs(weight.mean()) * math.sqrt(count) < MAX_SIGMAS
    assert abs(weight.std() - 1) * math.sqrt(2 * count) < MAX_SIGMAS
    assert abs((weight**4).mean() - 3) * math.sqrt(count / 96) < MAX_SIGMAS
    products = weight[:-ROWS_PER_BLOCK] * weight[ROWS_PER_BLOCK:]
    assert abs(products.mean()) * math.sqrt(products.numel()) < MAX_SIGMAS


@settings(max_examples=60, deadline=None)
@given(part_rows=st.integers(1, 150), ranks=st.sampled_from([1, 2, 3, 8]), num_parts=st.sampled_from([1, 2]))
def test_pieces_of_all_ranks_are_the_stacked_matrix(part_rows, ranks, num_parts):
    """Global row numbers, dealt out by `_pieces`, equal the split of [gate; up] into per-rank [gate; up]."""
    full = np.arange(part_rows * ranks * num_parts).reshape(num_parts, ranks, part_rows)
    for rank in range(ranks):
        shard = np.full(part_rows * num_parts, -1)
        for local, block, first, count in _pieces(part_rows * num_parts, (rank, ranks), num_parts):
            assert first + count <= ROWS_PER_BLOCK
            start = block * ROWS_PER_BLOCK + first
            shard[local : local + count] = np.arange(start, start + count)
        assert (shard == full[:, rank].ravel()).all()


def test_init_std_follows_megatrons_rules():
    config = make_config()
    assert init_std(NAME, config) == STD
    assert init_std("output_layer.weight", config) == STD
    assert init_std(EMBEDDING_NAME, config) == 0.05
    assert init_std(EMBEDDING_NAME, make_config(embedding_init_method_std=None)) == STD
    for module in ("self_attention.linear_proj", "mlp.linear_fc2"):
        assert init_std(f"decoder.layers.0.{module}.weight", config) == pytest.approx(STD / 4, rel=1e-12)


def test_initialize_parameters_overwrites_everything():
    model = Model(Linear(32, 48))
    initialize_parameters([model], seed=SEED, config=make_config())
    assert torch.equal(model.linear_fc1.weight, full_weight("linear_fc1.weight", (96, 32), STD, SEED))
    assert torch.equal(model.linear_fc2.weight, full_weight("linear_fc2.weight", (32, 48), STD / 4, SEED))
    assert (model.final_layernorm.weight == 1).all()
    for module in (model.linear_fc1, model.linear_fc2, model.final_layernorm):
        assert (module.bias == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_initialize_parameters_rounds_the_fp32_value_once(dtype):
    model = Model(Linear(32, 48, dtype), dtype)
    initialize_parameters([model], seed=SEED, config=make_config())
    expected = full_weight("linear_fc1.weight", (96, 32), STD, SEED).to(dtype)
    assert torch.equal(model.linear_fc1.weight, expected)


def test_threaded_fill_equals_full_weight():
    model = torch.nn.ModuleDict({"linear_fc1": Linear(1 << 10, 1 << 10)})
    initialize_parameters([model], seed=SEED, config=make_config())
    assert torch.equal(
        model["linear_fc1"].weight, full_weight("linear_fc1.weight", (1 << 10, 1 << 10), STD, SEED)
    )


def test_reparametrized_linear_receives_the_plain_weight():
    model = Model(Reparametrized(32, 48))
    initialize_parameters([model], seed=SEED, config=make_config())
    expected = full_weight("linear_fc2.weight", (32, 48), STD / 4, SEED)
    assert torch.equal(model.linear_fc2.received, expected)
    assert (model.linear_fc2.bias == 0).all()
    assert (model.linear_fc2.weight == 7).all(), "its parameters are its own business"


def test_parameter_without_a_rule_is_refused():
    model = torch.nn.Module()
    model.softmax_offset = torch.nn.Parameter(torch.zeros(4))
    with pytest.raises(ConfigError, match="softmax_offset"):
        initialize_parameters([model], seed=SEED, config=make_config())


def test_names_ignore_wrappers_and_count_layers_globally():
    model = Model(Linear(32, 48))
    wrapper = torch.nn.Module()
    wrapper.module = torch.nn.Module()
    wrapper.module.module = model
    assert set(global_parameter_names([wrapper]).values()) == {name for name, _ in model.named_parameters()}
    assert copy_global_name("decoder.layers.0", 6) == "decoder.layers.5"
