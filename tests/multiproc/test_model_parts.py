"""Attention, norms, loss and initialisation inside megatron-core on 1 to 4 gloo ranks.

Oracles: a naive fp64 softmax attention, torch's norms and cross entropy on the whole tensors, megatron's own
functions, and the same computation on one rank.
"""

import functools
import pickle

import pytest
import torch
from torch.nn import functional

from tests._distributed import run_ranks

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}

# Largest error relative to the largest element; measured worst case beside each.
ATTENTION_TOLERANCE = {"fp64": 1e-14, "fp32": 5e-6, "bf16": 1.5e-2}  # 1.1e-15, 7.0e-7, 6.5e-3
CONTEXT_PARALLEL_TOLERANCE = {"fp64": 1e-12, "fp32": 1e-6}  # 9.7e-16, 5.2e-7
NORM_TOLERANCE = {"fp64": 1e-14, "fp32": 1e-6, "bf16": 1e-2}  # 2.6e-16, 1.1e-7, 4.0e-3
LOSS_TOLERANCE = {"fp64": 1e-14, "fp32": 1e-6, "bf16": 1e-2}  # 3.0e-16, 1.1e-7, 2.9e-3
MODEL_LOSS_TOLERANCE = 1e-6  # 9.9e-8


def relative_error(actual, expected):
    expected = expected.double()
    return float((actual.double() - expected).abs().max() / expected.abs().max())


def run_ranks_with_tensors(fn, world_size, *args):
    """`run_ranks` for functions that return `pickle.dumps(result)`: a queue would send tensors as shared
    memory that dies with its rank.
    """
    return [pickle.loads(result) for result in run_ranks(fn, world_size, *args)]


def start_megatron(tp=1, pp=1, cp=1, vpp=None):
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        context_parallel_size=cp,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(7)


def make_config(**changes):
    from megatron.core.transformer.transformer_config import TransformerConfig

    values = {
        "num_layers": 4,
        "hidden_size": 32,
        "ffn_hidden_size": 96,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 8,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": functional.silu,
        "bias_activation_fusion": False,
        "masked_softmax_fusion": False,
        "normalization": "RMSNorm",
        "init_method_std": 0.02,
        "pipeline_dtype": torch.float32,
        "use_cpu_initialization": True,
    }
    return TransformerConfig(**(values | changes))


# ---- attention ----


def naive_attention(query, key, value, masked_out):
    """softmax(q k^T / sqrt(d)) v in fp64 by an explicit score matrix; `masked_out` fits [b, H, s, t]."""
    heads_per_group = query.shape[2] // key.shape[2]
    key, value = (x.double().repeat_interleave(heads_per_group, dim=2) for x in (key, value))
    scores = torch.einsum("sbhd,tbhd->bhst", query.double(), key) / query.shape[-1] ** 0.5
    probabilities = scores.masked_fill(masked_out, float("-inf")).softmax(-1)
    return torch.einsum("bhst,tbhd->sbhd", probabilities, value).flatten(2)


def future(length):
    return torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]


def with_gradients(function, tensors, grad_output):
    """Return the output of `function(*tensors)` and the gradients of the tensors."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out = function(*leaves)
    out.backward(grad_output.to(out.dtype))
    return [out.detach(), *(x.grad for x in leaves)]


def make_attention(dtype=torch.float32, **changes):
    from megatron.core.transformer.enums import AttnMaskType

    from metis.mcore.attention import SdpaCoreAttention

    constructor = {name: changes.pop(name) for name in ("cp_comm_type", "softmax_scale") if name in changes}
    config = make_config(params_dtype=dtype, **changes)
    return SdpaCoreAttention(config, 1, AttnMaskType.causal, "self", **constructor)


def random_qkv(length, groups, dtype, batch=2):
    generator = torch.Generator().manual_seed(3)
    shapes = [(length, batch, 4, 8), (length, batch, groups, 8), (length, batch, groups, 8)]
    qkv = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return qkv, torch.randn(length, batch, 32, generator=generator, dtype=torch.float64)


def attention_errors(rank, world_size):
    from megatron.core.transformer.enums import AttnBackend, AttnMaskType

    start_megatron()
    length = 12
    document_mask = future(length) | (torch.arange(length)[:, None] >= 5) & (torch.arange(length) < 5)
    padding = torch.zeros(2, 1, 1, length, dtype=torch.bool)
    padding[1, ..., 9:] = True
    masks = {
        "causal": (AttnMaskType.causal, None, future(length)),
        "documents": (AttnMaskType.causal, document_mask, document_mask),
        "causal and padding": (AttnMaskType.causal, padding, padding | future(length)),
        "padding": (AttnMaskType.padding, padding, padding),
        "none": (AttnMaskType.no_mask, None, torch.zeros(1, 1, 1, 1, dtype=torch.bool)),
    }
    errors = {}
    for dtype_name, dtype in DTYPES.items():
        for groups in (4, 2, 1):
            for backend in (AttnBackend.auto, AttnBackend.unfused):
                attention = make_attention(dtype, num_query_groups=groups, attention_backend=backend)
                qkv, grad = random_qkv(length, groups, dtype)
                for mask_name, (mask_type, mask, masked_out) in masks.items():
                    actual = with_gradients(lambda *x: attention(*x, mask, mask_type), qkv, grad)  # noqa: B023
                    expected = with_gradients(
                        lambda *x: naive_attention(*x, masked_out),  # noqa: B023
                        [x.double() for x in qkv],
                        grad.to(dtype),
                    )
                    assert actual[0].dtype == dtype
                    case = (dtype_name, groups, backend.name, mask_name)
                    errors[case] = max(relative_error(a, e) for a, e in zip(actual, expected, strict=True))
    scaled = make_attention(torch.float64, softmax_scale=1.0)
    qkv, _ = random_qkv(length, 2, torch.float64)
    expected = naive_attention(qkv[0] * 8**0.5, *qkv[1:], future(length))
    errors["fp64", "softmax_scale"] = relative_error(scaled(*qkv, None), expected)
    bottom_right = make_attention(torch.float64)(
        qkv[0][-3:], *qkv[1:], None, AttnMaskType.causal_bottom_right
    )
    expected = naive_attention(*qkv, future(length))[-3:]
    errors["fp64", "bottom right"] = relative_error(bottom_right, expected)
    return errors


def test_attention_equals_naive_softmax():
    errors = run_ranks(attention_errors, 1)[0]
    assert len(errors) == 92
    too_large = {case: error for case, error in errors.items() if error > ATTENTION_TOLERANCE[case[0]]}
    assert not too_large


def attention_dropout_outputs(rank, world_size):
    from megatron.core import tensor_parallel

    start_megatron(tp=2)
    attention = make_attention(attention_dropout=0.5)
    qkv, _ = random_qkv(16, 2, torch.float32, batch=8)
    evaluated = attention.eval()(*qkv, None)
    attention.train()
    before = torch.get_rng_state()
    states = tensor_parallel.get_cuda_rng_tracker().get_states()
    states = {name: state.clone() for name, state in states.items()}
    first = attention(*qkv, None)
    unchanged_default = torch.equal(before, torch.get_rng_state())
    second = attention(*qkv, None)
    tensor_parallel.get_cuda_rng_tracker().set_states(states)
    replayed = attention(*qkv, None)
    mean = torch.stack([attention(*qkv, None) for _ in range(200)]).mean(0)
    result = {
        "first": first,
        "second": second,
        "replayed": replayed,
        "mean error": (mean - evaluated).abs().mean() / evaluated.abs().mean(),
        "default stream unchanged": unchanged_default,
    }
    return pickle.dumps(result)


def test_attention_dropout_draws_from_the_tensor_parallel_stream():
    ranks = run_ranks_with_tensors(attention_dropout_outputs, 2)
    for result in ranks:
        assert result["default stream unchanged"]
        assert torch.equal(result["first"], result["replayed"])
        assert not torch.equal(result["first"], result["second"])
        # 200 draws at p = 0.5: standard error of about 0.07 of a term; without rescaling by 1/(1-p) it is
        # 0.5.
        assert result["mean error"] < 0.2
    assert not torch.equal(ranks[0]["first"], ranks[1]["first"]), "heads of different ranks draw apart"


def attention_refusals(rank, world_size):
    from megatron.core.transformer.enums import AttnBackend, AttnMaskType

    start_megatron()
    qkv, _ = random_qkv(8, 2, torch.float32)
    attention = make_attention()
    cases = [
        lambda: make_attention(attention_backend=AttnBackend.fused)(*qkv, None),
        lambda: make_attention(window_size=(4, 0)),
        lambda: make_attention(softmax_type="off-by-one"),
        lambda: make_attention(cp_comm_type="a2a"),
        lambda: attention(*qkv, torch.zeros(1, 1, 8, 7, dtype=torch.bool)),
        lambda: attention(*qkv, None, AttnMaskType.padding),
        lambda: attention(qkv[0][:4], *qkv[1:], None),
        lambda: attention(*qkv, None, attention_bias=torch.zeros(1)),
    ]
    messages = []
    for case in cases:
        with pytest.raises(ValueError) as caught:
            case()
        messages.append(f"{type(caught.value).__name__} {caught.value}")
    return messages


def test_attention_refuses_what_it_cannot_do():
    words = (
        "ConfigError --attention-backend",
        "ConfigError --window-size",
        "ConfigError --softmax-type",
        "ConfigError --cp-comm-type",
        "ShapeError core_attention: attention_mask must end in [8, 8]",
        "ShapeError core_attention: padding needs",
        "ShapeError core_attention: causal attention",
        "ConfigError core_attention",
    )
    messages = run_ranks(attention_refusals, 1)[0]
    for message, word in zip(messages, words, strict=True):
        assert message.startswith(word)


def context_parallel_errors(rank, world_size):
    """Each rank attends with its zigzag part; errors against the same rows of the whole attention."""
    start_megatron(cp=world_size)
    length = 8 * world_size
    chunks = torch.arange(length).chunk(2 * world_size)
    rows = torch.cat((chunks[rank], chunks[-1 - rank]))
    reset = future(length) | (torch.arange(length)[:, None] >= 11) & (torch.arange(length) < 11)
    errors = {}
    for dtype_name in CONTEXT_PARALLEL_TOLERANCE:
        dtype = DTYPES[dtype_name]
        qkv, grad = random_qkv(length, 2, dtype)
        attention = make_attention(dtype, context_parallel_size=world_size)
        for mask_name, mask in (("causal", None), ("documents", reset)):
            whole = with_gradients(
                lambda *x: (
                    functional.scaled_dot_product_attention(
                        *(y.permute(1, 2, 0, 3) for y in x),
                        attn_mask=~(future(length) if mask is None else mask),  # noqa: B023
                        enable_gqa=True,
                    )
                    .permute(2, 0, 1, 3)
                    .flatten(2)
                ),
                qkv,
                grad,
            )
            part = with_gradients(
                lambda *x: attention(*x, None if mask is None else mask[..., rows, :]),  # noqa: B023
                [x[rows] for x in qkv],
                grad[rows],
            )
            errors[dtype_name, mask_name] = [
                relative_error(p, w[rows]) for p, w in zip(part, whole, strict=True)
            ]
    return errors


@pytest.mark.parametrize("cp", [2, 4])
def test_context_parallel_attention_equals_one_rank(cp):
    for errors in run_ranks(context_parallel_errors, cp):
        for (dtype, mask), values in errors.items():
            assert max(values) <= CONTEXT_PARALLEL_TOLERANCE[dtype], (dtype, mask, values)


# ---- norms ----


def norm_results(rank, world_size):
    from metis.mcore.norm import LayerNorm, RMSNorm, build_norm

    start_megatron()
    results = {}
    generator = torch.Generator().manual_seed(5)
    base = torch.randn(6, 2, 32, generator=generator, dtype=torch.float64) * 3
    base_weight = 1 + torch.randn(32, generator=generator, dtype=torch.float64) / 4
    base_grad = torch.randn(6, 2, 32, generator=generator, dtype=torch.float64)
    oracles = {"RMSNorm": (RMSNorm, torch.nn.RMSNorm), "LayerNorm": (LayerNorm, torch.nn.LayerNorm)}
    for name, (ours, torchs) in oracles.items():
        for dtype_name, dtype in DTYPES.items():
            config = make_config(normalization=name, params_dtype=dtype, layernorm_epsilon=1e-3)
            norm, oracle = build_norm(config, 32, eps=1e-3), torchs(32, eps=1e-3, dtype=torch.float64)
            assert type(norm) is ours and norm.weight.dtype == dtype
            x, weight, grad = (y.to(dtype) for y in (base, base_weight, base_grad))
            norm.weight.data.copy_(weight)
            oracle.weight.data.copy_(weight)
            actual = [*with_gradients(norm, [x], grad), norm.weight.grad]
            expected = [*with_gradients(oracle, [x.double()], grad), oracle.weight.grad]
            assert actual[0].dtype == dtype
            results[name, dtype_name] = [relative_error(a, e) for a, e in zip(actual, expected, strict=True)]
    x = base.bfloat16()
    norm = RMSNorm(make_config(params_dtype=torch.bfloat16), 32, eps=1e-3)
    norm.weight.data.copy_(base_weight)
    x32 = x.float()
    llama = (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + 1e-3)).bfloat16() * norm.weight
    results["order"] = int((norm(x) != llama).sum())
    results["saved"] = [tuple(t.shape) for t in norm(x.requires_grad_()).grad_fn.saved_tensors]
    return results


def test_norms_equal_torchs():
    results = run_ranks(norm_results, 1)[0]
    assert results.pop("order") == 0, "rounded to bf16 before the weight, as LLaMA does"
    assert results.pop("saved") == [(6, 2, 32), (32,)], "only the input and the weight live until backward"
    for (name, dtype), errors in results.items():
        assert max(errors) <= NORM_TOLERANCE[dtype], (name, dtype, errors)


def sequence_parallel_norm_gradient(rank, world_size):
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.distributed.finalize_model_grads import _allreduce_non_tensor_model_parallel_grads

    from metis.mcore.norm import norm_class

    start_megatron(tp=world_size)
    gradients = {}
    for name in ("RMSNorm", "LayerNorm"):
        config = make_config(
            normalization=name,
            sequence_parallel=True,
            tensor_model_parallel_size=2,
            params_dtype=torch.float64,
        )
        x = torch.randn(8, 2, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        norm = norm_class(name)(config, 32)
        norm.ddp_config = DistributedDataParallelConfig()
        norm(x.chunk(world_size)[rank]).square().sum().backward()
        _allreduce_non_tensor_model_parallel_grads([norm], config)
        whole = getattr(torch.nn, name)(32, eps=1e-5, dtype=torch.float64)
        whole(x).square().sum().backward()
        gradients[name] = [
            relative_error(p.grad, w.grad) for p, w in zip(norm.parameters(), whole.parameters(), strict=True)
        ]
    return gradients


def test_norm_gradients_are_summed_over_tensor_parallel_ranks_under_sequence_parallelism():
    for gradients in run_ranks(sequence_parallel_norm_gradient, 2):
        assert max(gradients["RMSNorm"] + gradients["LayerNorm"]) < NORM_TOLERANCE["fp64"]


# ---- cross entropy ----


def true_cross_entropy(logits, labels, vocab_size):
    flat = functional.cross_entropy(
        logits[..., :vocab_size].flatten(0, 1), labels.flatten(), reduction="none"
    )
    return flat.view(labels.shape)


def cross_entropy_results(rank, world_size):
    from megatron.core import tensor_parallel

    from metis.mcore.cross_entropy import vocab_parallel_cross_entropy

    start_megatron(tp=world_size)
    generator = torch.Generator().manual_seed(11)
    padded = 48
    base = torch.randn(5, 2, padded, generator=generator, dtype=torch.float64) * 4
    base_grad = torch.rand(5, 2, generator=generator, dtype=torch.float64)
    part = slice(rank * padded // world_size, (rank + 1) * padded // world_size)
    results = {}

    def ours(dtype, labels, vocab_size, fusion=False):
        return with_gradients(
            lambda x: vocab_parallel_cross_entropy(x * 1, labels, vocab_size=vocab_size, fusion=fusion),
            [base[..., part].to(dtype)],
            base_grad,
        )

    # 48: no padding; 37: padding on the last rank; 20: at TP=2 the last rank holds nothing else.
    for vocab_size in (48, 37, 20):
        labels = torch.randint(vocab_size, (5, 2), generator=generator)
        for dtype_name, dtype in DTYPES.items():
            loss, grad = ours(dtype, labels, vocab_size)
            oracle = functools.partial(true_cross_entropy, labels=labels, vocab_size=vocab_size)
            expected, expected_grad = with_gradients(oracle, [base.to(dtype).double()], base_grad)
            assert grad.dtype == dtype
            assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert (grad[..., max(vocab_size - part.start, 0) :] == 0).all()
            errors = [relative_error(loss, expected), relative_error(grad, expected_grad[..., part])]
            results[dtype_name, vocab_size] = errors
        fused = ours(torch.bfloat16, labels, vocab_size, fusion=True)
        plain = ours(torch.bfloat16, labels, vocab_size)
        results["bf16", "fused", vocab_size] = [
            relative_error(f, p) for f, p in zip(fused, plain, strict=True)
        ]
    results["bitwise"] = []
    for dtype in (torch.float32, torch.bfloat16):
        labels = torch.randint(padded, (5, 2), generator=generator)
        theirs = with_gradients(
            lambda x: tensor_parallel.vocab_parallel_cross_entropy(x * 1, labels),  # noqa: B023
            [base[..., part].to(dtype)],
            base_grad,
        )
        pairs = zip(ours(dtype, labels, padded), theirs, strict=True)
        results["bitwise"].append(all(torch.equal(a, b) for a, b in pairs))
    dummy_label = torch.full((5, 2), 40)
    results["dummy label"] = [bool(x.isfinite().all()) for x in ours(torch.float32, dummy_label, 37)]
    with pytest.raises(ValueError, match="must cover the vocabulary of 49"):
        ours(torch.float32, dummy_label, 49)
    return results


@pytest.mark.parametrize("tp", [1, 2])
def test_cross_entropy_equals_torchs_on_the_true_vocabulary(tp):
    for results in run_ranks(cross_entropy_results, tp):
        assert all(results.pop("bitwise")), "equals megatron's function where nothing is padded"
        assert all(results.pop("dummy label"))
        for case, errors in results.items():
            assert max(errors) <= LOSS_TOLERANCE[case[0]], (case, errors)


# ---- model and initialisation ----


def build_chunks(config, padded_vocab_size, tied, true_vocab_size=100):
    """Build and initialise this rank's model chunks: our attention and norms in megatron's local layer."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_block import (
        TransformerBlockSubmodules,
        get_num_layers_to_build,
    )

    from metis.mcore.attention import SdpaCoreAttention
    from metis.mcore.initialization import initialize_parameters
    from metis.mcore.model import LlamaModel
    from metis.mcore.norm import norm_class

    norm = norm_class(config.normalization)
    spec = get_gpt_layer_local_spec(normalization=config.normalization)
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = norm
    spec.submodules.self_attention.submodules.core_attention = SdpaCoreAttention
    vpp = config.virtual_pipeline_model_parallel_size
    chunks = [
        LlamaModel(
            config=config,
            transformer_layer_spec=TransformerBlockSubmodules(
                layer_specs=[spec] * get_num_layers_to_build(config, vp_stage=stage if vpp else None),
                layer_norm=norm,
            ),
            vocab_size=padded_vocab_size,
            true_vocab_size=true_vocab_size,
            max_sequence_length=16,
            position_embedding_type="rope",
            share_embeddings_and_output_weights=tied,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
            vp_stage=stage if vpp else None,
        )
        for stage in range(vpp or 1)
    ]
    initialize_parameters(chunks, seed=42, config=config)
    return chunks


def initialized_shards(rank, world_size, layouts, tied):
    from megatron.core import parallel_state

    from metis.mcore.initialization import global_parameter_names

    results = []
    for tp, pp, vpp in layouts:
        start_megatron(tp=tp, pp=pp, vpp=vpp)
        config = make_config(
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            virtual_pipeline_model_parallel_size=vpp,
        )
        chunks = build_chunks(config, padded_vocab_size=128 * tp, tied=tied)
        tp_rank = parallel_state.get_tensor_model_parallel_rank()
        results.append(
            [
                (name, tp_rank, getattr(parameter, "partition_dim", -1), parameter.detach().clone())
                for parameter, name in global_parameter_names(chunks).items()
            ]
        )
    return pickle.dumps(results)


def assemble(ranks):
    """Put the shards of all ranks together; every copy of a shard must be bitwise the same."""
    shards, dims = {}, {}
    for rank in ranks:
        for name, tp_rank, dim, values in rank:
            dims[name] = dim
            known = shards.setdefault(name, {}).setdefault(tp_rank, values)
            assert torch.equal(known, values), name
    full = {}
    for name, by_rank in shards.items():
        parts = [by_rank[index] for index in sorted(by_rank)]
        if dims[name] < 0:
            assert all(torch.equal(part, parts[0]) for part in parts), name
            full[name] = parts[0]
        elif "linear_fc1" in name:
            halves = [part.chunk(2) for part in parts]
            full[name] = torch.cat([half[0] for half in halves] + [half[1] for half in halves])
        else:
            full[name] = torch.cat(parts, dim=dims[name])
    return full


@functools.cache
def one_rank_tensors(tied):
    return assemble([run_ranks_with_tensors(initialized_shards, 1, [(1, 1, None)], tied)[0][0]])


@pytest.mark.parametrize("tied", [False, True])
def test_initial_weights_do_not_depend_on_the_layout(tied):
    """Bitwise; the vocabulary is padded to 128 on one rank and to 256 at TP=2, its common rows are equal."""
    expected = one_rank_tensors(tied)
    assert ("output_layer.weight" in expected) != tied
    layouts = [(2, 1, None), (1, 2, None), (1, 2, 2)]
    ranks = run_ranks_with_tensors(initialized_shards, 2, layouts, tied)
    for index, layout in enumerate(layouts):
        full = assemble([rank[index] for rank in ranks])
        assert full.keys() == expected.keys(), layout
        for name, values in full.items():
            rows = expected[name].shape[0]
            assert torch.equal(values[:rows], expected[name]), (layout, name)
            assert len(values) == (256 if layout[0] == 2 and rows == 128 else rows)


def test_initial_weights_at_tensor_and_pipeline_parallel_two():
    expected = one_rank_tensors(False)
    full = assemble(
        [rank[0] for rank in run_ranks_with_tensors(initialized_shards, 4, [(2, 2, None)], False)]
    )
    for name, values in full.items():
        assert torch.equal(values[: expected[name].shape[0]], expected[name]), name


def test_initial_weights_have_megatrons_scales():
    for name, values in one_rank_tensors(False).items():
        if values.dim() == 1:
            assert (values == 1).all(), name
            continue
        std = 0.02 / (2 * 4) ** 0.5 if "linear_proj" in name or "linear_fc2" in name else 0.02
        sigmas = abs(float(values.double().std()) / std - 1) * (2 * values.numel()) ** 0.5
        assert sigmas < 5, (name, sigmas)


def model_losses(rank, world_size, tied):
    start_megatron(tp=world_size)
    tokens = torch.randint(100, (2, 17), generator=torch.Generator().manual_seed(2))
    positions = torch.arange(16).expand(2, -1)
    losses = []
    for sequence_parallel in (False, world_size > 1):
        config = make_config(tensor_model_parallel_size=world_size, sequence_parallel=sequence_parallel)
        (model,) = build_chunks(config, padded_vocab_size=128 * world_size, tied=tied)
        losses.append(model(tokens[:, :-1], positions, None, labels=tokens[:, 1:]).detach())
    return pickle.dumps(losses)


@pytest.mark.parametrize("tied", [False, True])
def test_model_loss_does_not_depend_on_padding_or_tensor_parallelism(tied):
    """TP=1 pads 100 tokens to 128, TP=2 to 256; megatron's own loss would differ by log(256/128)."""
    expected = run_ranks_with_tensors(model_losses, 1, tied)[0][0]
    assert expected.shape == (2, 16)
    assert abs(float(expected.mean()) - float(torch.tensor(100.0).log())) < 0.1
    for rank in run_ranks_with_tensors(model_losses, 2, tied):
        for losses in rank:
            assert relative_error(losses, expected) < MODEL_LOSS_TOLERANCE


def model_refusals(rank, world_size):
    start_megatron()
    with pytest.raises(ValueError, match="--vocab-size: must be between 1 and the padded size 128, got 129"):
        build_chunks(make_config(), 128, tied=False, true_vocab_size=129)
    config = make_config(cross_entropy_loss_fusion=True, cross_entropy_fusion_impl="te")
    with pytest.raises(ValueError, match="--cross-entropy-fusion-impl: must be native, got te"):
        build_chunks(config, 128, tied=False)
    from metis.mcore.norm import RMSNorm, norm_class

    with pytest.raises(ValueError, match="--normalization: must be one of RMSNorm, LayerNorm, got L2Norm"):
        norm_class("L2Norm")
    with pytest.raises(ValueError, match="--apply-layernorm-1p"):
        RMSNorm(make_config(layernorm_zero_centered_gamma=True), 32)
    return True


def test_model_refuses_what_it_cannot_do():
    assert run_ranks(model_refusals, 1) == [True]
