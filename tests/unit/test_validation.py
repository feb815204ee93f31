"""Validation: what follows from the arguments, and one clear line for every mistake, before torch is
imported.

Oracles: values worked out by hand from the rules of Megatron-LM core_v0.16.1; for each mistake the option to
change and the words that name it.
"""

import json

import pytest

from metis.errors import ConfigError
from metis.training.accounting import resolved_config
from metis.training.arguments import parse_args, validate_args

TINY = "--preset tiny --mock-data --vocab-size 1000 --micro-batch-size 2 --lr 1e-3 --train-iters 10"


def resolve(extra: str = "", *, base: str = TINY, world_size: int = 1):
    args = parse_args([*base.split(), *extra.split()])
    validate_args(args, world_size)
    return args


# --- derived values ---------------------------------------------------------------------------------------


def test_derived_shape():
    shape = (
        "--num-layers 2 --hidden-size 1024 --num-attention-heads 16 --num-query-groups 4 --mock-data --lr 1"
    )
    rest = (
        " --seq-length 64 --max-position-embeddings 64 --micro-batch-size 1 --train-iters 1 --vocab-size 99"
    )
    args = resolve("--swiglu", base=shape + rest)
    assert args.ffn_hidden_size == 2688  # 8/3 * 1024 = 2730.7, rounded down to 64
    assert args.kv_channels == 64
    assert args.num_query_groups == 16  # without --group-query-attention
    assert resolve(base=shape + rest).ffn_hidden_size == 4096
    assert resolve("--group-query-attention", base=shape + rest).num_query_groups == 4
    assert resolve("--use-rotary-position-embeddings", base=shape + rest).position_embedding_type == "rope"


def test_derived_layout_and_batch():
    args = resolve("--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2", world_size=8)
    assert (args.data_parallel_size, args.global_batch_size) == (2, 4)
    assert (args.virtual_pipeline_model_parallel_size, args.overlap_p2p_comm, args.batch_p2p_comm) == (
        None,
        False,
        True,
    )
    assert args.padded_vocab_size == 1024


def test_interleaving_over_two_stages_is_corrected():
    args = resolve(
        "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 --global-batch-size 4",
        world_size=2,
    )
    assert args.virtual_pipeline_model_parallel_size == 2
    assert args.overlap_p2p_comm and not args.batch_p2p_comm


def test_precision_derivations():
    assert resolve().params_dtype_name == "fp32"
    bf16 = resolve("--bf16")
    assert bf16.params_dtype_name == "bf16" and bf16.accumulate_allreduce_grads_in_fp32
    assert not resolve("--bf16 --grad-reduce-in-bf16").accumulate_allreduce_grads_in_fp32


def test_sequence_parallel_is_off_with_a_warning_without_tensor_parallelism(capsys):
    assert not resolve("--sequence-parallel").sequence_parallel
    assert "--sequence-parallel is off" in capsys.readouterr().err
    assert resolve("--sequence-parallel --tensor-model-parallel-size 2", world_size=2).sequence_parallel


def test_overlapped_tensor_parallel_messages_need_sequence_parallelism_and_linears_of_ours(capsys):
    assert not resolve("--tp-comm-overlap").tp_comm_overlap
    assert "--tp-comm-overlap is off" in capsys.readouterr().err
    two = "--tp-comm-overlap --tensor-model-parallel-size 2"
    assert resolve(f"{two} --sequence-parallel", world_size=2).tp_comm_overlap
    for options, missing in (
        (two, "--sequence-parallel"),
        (f"{two} --sequence-parallel --transformer-impl transformer_engine", "--transformer-impl local"),
        (f"{two} --sequence-parallel --spec some.module some_function", "no --spec"),
    ):
        with pytest.raises(ConfigError, match=f"--tp-comm-overlap: needs {missing}"):
            resolve(options, world_size=2)


def test_preset_vocabulary_counts_the_end_of_document_of_the_null_tokenizer():
    args = resolve(base="--preset llama3-8b --mock-data --micro-batch-size 1 --lr 1 --train-iters 1")
    assert (args.tokenizer_type, args.vocab_size, args.padded_vocab_size) == ("NullTokenizer", 128255, 128256)


# --- recipe and policy ------------------------------------------------------------------------------------


def test_fp4_format_is_recipe_nvfp4():
    named, megatron = resolve("--recipe nvfp4"), resolve("--fp4-format e2m1 --fp4-recipe nvfp4")
    assert megatron.recipe == "nvfp4"
    assert megatron.resolved_recipe == named.resolved_recipe != resolve().resolved_recipe
    assert megatron.resolved_policy == named.resolved_policy


def test_bf16_edge_counts_define_the_policy():
    def kept(options: str) -> list[int]:
        other = resolved_config(resolve(f"--recipe nvfp4 {options}"))["recipe_of_other_linears"]
        return sorted({int(path.split(".")[2]) for path in other})

    assert kept("") == [3]  # the default: the last eighth, at least one
    assert kept("--first-last-layers-bf16") == [0, 3]
    assert kept("--num-layers-at-start-in-bf16 0 --num-layers-at-end-in-bf16 2") == [2, 3]
    assert kept("--policy all") == []


# --- mistakes ---------------------------------------------------------------------------------------------

# fmt: off
MISTAKES = [
    # options, ranks, where, words of the message
    ("--hidden-sice 8", 1, "--hidden-sice", "known option; did you mean '--hidden-size'?"),
    ("--hidden 8", 1, "--hidden", "known option"),
    ("stray", 1, "command line", "'stray'"),
    ("--num-layers four", 1, "--num-layers", "invalid int value: 'four'"),
    ("--num-layers", 1, "--num-layers", "expected one argument"),
    ("--num-layers 0", 1, "--num-layers", "at least 1, received 0"),
    ("--lr nan", 1, "--lr", "received nan"),
    ("--attention-dropout 1.5", 1, "--attention-dropout", "at most 1"),
    ("--num-experts 8", 1, "--num-experts", "dense"),
    ("--moe-grouped-gemm", 1, "--moe-grouped-gemm", "dense"),
    ("--fp8-format hybrid", 1, "--fp8-format", "--recipe"),
    ("--use-megatron-fsdp", 1, "--use-megatron-fsdp", "--use-distributed-optimizer"),
    ("--expert-model-parallel-size 2", 2, "--expert-model-parallel-size", "at most 1"),
    ("--optimizer muon", 1, "--optimizer", "use adam"),
    ("--ckpt-format torch", 1, "--ckpt-format", "torch_dist"),
    ("--cp-comm-type p2p", 1, "--cp-comm-type", "use all_gather"),
    ("--normalization RMSnorm", 1, "--normalization", "did you mean 'RMSNorm'?"),
    ("--preset lama3-8b", 1, "--preset", "did you mean 'llama3-8b'?"),
    ("--recipe metsi", 1, "--recipe", "did you mean 'metis'?"),
    ("--fp4-format e2m1 --recipe metis", 1, "--fp4-format", "means --recipe nvfp4"),
    ("--policy all --first-last-layers-bf16", 1, "--policy", "must not be combined"),
    ("--num-layers-at-end-in-bf16 9", 1, "--num-layers-at-end-in-bf16", "[0, 4]"),
    ("--tensor-model-parallel-size 2", 3, "--tensor-model-parallel-size", "world size of 3"),
    ("--tensor-model-parallel-size 3", 3,
     "--num-attention-heads", "divisible by --tensor-model-parallel-size 3"),
    ("--tensor-model-parallel-size 8", 8, "--num-query-groups", "received 4"),
    ("--tensor-model-parallel-size 2 --ffn-hidden-size 705", 2, "--ffn-hidden-size", "received 705"),
    ("--tensor-model-parallel-size 4 --padded-vocab-size 1002", 4, "--padded-vocab-size", "received 1002"),
    ("--padded-vocab-size 1000", 1, "--padded-vocab-size", "vocabulary too small"),
    ("--pipeline-model-parallel-size 3", 3, "--num-layers", "received 4 layers"),
    ("--pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 4", 2, "--num-layers", "split"),
    ("--num-virtual-stages-per-pipeline-rank 2", 1, "--num-virtual-stages-per-pipeline-rank", "at least 2"),
    ("--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2 "
     "--no-overlap-p2p-communication --global-batch-size 4", 2,
     "--no-overlap-p2p-communication", "mixed up"),
    ("--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2", 2,
     "--global-batch-size", "of 4"),
    ("--context-parallel-size 2 --seq-length 250", 2, "--seq-length", "multiple of 2 x context"),
    ("--seq-length 2048", 1, "--max-position-embeddings", "at least --seq-length 2048"),
    ("--kv-channels 31", 1, "--kv-channels", "even number"),
    ("--num-query-groups 3", 1, "--num-query-groups", "must divide --num-attention-heads 8"),
    ("--global-batch-size 3", 1, "--global-batch-size", "multiple of --micro-batch-size"),
    ("--rampup-batch-size 2 2 100", 1, "--rampup-batch-size", "counts samples"),
    ("--train-samples 100", 1, "--train-samples", "must not be combined with --train-iters"),
    ("--lr-warmup-samples 5", 1, "--lr-warmup-samples", "counts samples"),
    ("--lr-warmup-iters 10", 1, "--lr-warmup-iters", "shorter than the decay of 10"),
    ("--lr-warmup-iters 1 --lr-warmup-fraction 0.1", 1, "--lr-warmup-fraction", "must not be combined"),
    ("--min-lr 1", 1, "--min-lr", "must not exceed --lr 0.001"),
    ("--lr-decay-style WSD", 1, "--lr-wsd-decay-iters", "must be given"),
    ("--start-weight-decay 0.1", 1, "--start-weight-decay", "--weight-decay-incr-style"),
    ("--bf16 --fp16", 1, "--fp16", "--bf16"),
    ("--fp16 --recipe nvfp4", 1, "--fp16", "bf16 or fp32"),
    ("--exact-reductions --bf16", 1, "--exact-reductions", "remove --bf16"),
    ("--overlap-param-gather", 1, "--overlap-param-gather", "--use-distributed-optimizer"),
    ("--recompute-granularity full", 1, "--recompute-method", "uniform or block"),
    ("--recompute-method block", 1, "--recompute-method", "needs --recompute-granularity full"),
    ("--data-path x", 1, "--mock-data", "one data source too many"),
    ("--split 1,1,1,1", 1, "--split", "one to three shares"),
    ("--split 9e1,10", 1, "--split", "in digits and points"),
    ("--seed 4294967296", 1, "--seed", "must be at most 4294967295"),
    ("--fp16 --loss-scale 0", 1, "--loss-scale", "must be above 0 and finite, received 0.0"),
    ("--fp16 --loss-scale inf", 1, "--loss-scale", "must be above 0 and finite, received inf"),
    ("--save x", 1, "--save-interval", "must be given with --save"),
    ("--save x --save-interval 4 --save-retain-interval 6", 1, "--save-retain-interval", "multiple of"),
    ("--save-interval 4", 1, "--save-interval", "needs --save"),
    ("--ckpt-step 4", 1, "--ckpt-step", "needs --load"),
    ("--device cpu --distributed-backend nccl", 1, "--distributed-backend", "gloo"),
    ("--recipe nvfp4 --hidden-size 264", 1, "decoder.layers.0.self_attention.linear_qkv", "received 264"),
    ("--recipe metis --ffn-hidden-size 712", 1, "decoder.layers.0.mlp.linear_fc1", "gate (and up)"),
    ("--recipe nvfp4 --tensor-model-parallel-size 4 --ffn-hidden-size 736", 4, "linear_fc1", "received 184"),
    ("--recipe nvfp4 --seq-length 252", 1, "decoder.layers.0", "received 504 = 2 x 252 / 1"),
    ("--recipe nvfp4 --context-parallel-size 2 --seq-length 240", 2,
     "decoder.layers.0", "received 120 = 2 x 240 / 4"),
    ("--spec module", 1, "--spec", "a module and a name, received module"),
    ("--spec module name --recipe nvfp4", 1, "--spec", "use --recipe bf16"),
]
# fmt: on


@pytest.mark.parametrize(("options", "ranks", "where", "words"), MISTAKES)
def test_mistake_is_one_config_error(options, ranks, where, words):
    with pytest.raises(ConfigError) as caught:
        resolve(options, world_size=ranks)
    assert where in caught.value.where
    assert words in caught.value.message
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("removed", "where"),
    [
        ("--micro-batch-size 2", "--micro-batch-size"),
        ("--lr 1e-3", "--lr"),
        ("--train-iters 10", "--train-iters"),
        ("--mock-data", "--data-path"),
        ("--preset tiny", "--num-layers"),
    ],
)
def test_missing_option_is_named(removed, where):
    with pytest.raises(ConfigError) as caught:
        resolve(base=TINY.replace(removed, ""))
    assert caught.value.where == where


def test_sizes_that_fp4_cannot_block_are_fine_in_bf16():
    """The rule belongs to the recipe: the same sizes run without FP4, and where the policy keeps bf16."""
    resolve("--hidden-size 264")
    resolve("--recipe nvfp4 --hidden-size 264 --first-last-layers-bf16 --num-layers 2")


def test_policy_rule_without_match_and_misspelled_recipe_key_are_refused(tmp_path):
    policy = tmp_path / "policy.json"
    policy.write_text(
        json.dumps({"rules": [{"match": "decoder.layers.9.*", "recipe": "bf16"}, {"match": "*"}]})
    )
    with pytest.raises(ConfigError, match="must match at least one linear"):
        resolve(f"--recipe nvfp4 --policy {policy}")
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({"base": "nvfp4", "fprop_inptu": None}))
    with pytest.raises(ConfigError, match="did you mean 'fprop_input'"):
        resolve(f"--recipe {recipe}")


@pytest.mark.parametrize(
    ("recipe", "ranks", "words"),
    [
        (
            {"base": "metis_paper", "reparametrisation": {"rank": {"fixed": 24}}},
            1,
            "reparametrisation.rank div",
        ),
        (
            {
                "base": "metis_paper",
                "dgrad_grad_output": {"split": {"rank": {"fixed": 8}}},
                "wgrad_grad_output": {"split": {"rank": {"fixed": 8}}},
            },
            1,
            "rank of the grad_output split divisible by 16, since blocks run along it, received 8",
        ),
        (
            {"base": "bf16_reparametrised", "reparametrisation": {"rank": {"fixed": 600}}},
            1,
            "at most min(K, N) = 256, received 600",
        ),
        (
            {"base": "metis", "basis": {"num_canonical_chunks": 1}},
            2,
            "multiple of the tensor parallel size 2",
        ),
    ],
)
def test_ranks_and_chunks_of_a_recipe_file_are_checked_against_the_model(tmp_path, recipe, ranks, words):
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe))
    with pytest.raises(ConfigError) as caught:
        resolve(f"--recipe {path} --policy all --tensor-model-parallel-size {ranks}", world_size=ranks)
    assert caught.value.where.startswith("decoder.layers.0.") and words in caught.value.message


def test_factored_linears_follow_recipe_and_policy():
    factored = resolve("--recipe metis_paper").factored_linears
    assert len(factored) == 3 * 4 and set(factored.values()) == {16}  # one of four blocks stays in bf16
    assert resolve("--recipe metis").factored_linears == {}


def test_ramp_up_with_samples_is_accepted_and_checked():
    base = TINY.replace("--train-iters 10", "--train-samples 100")
    args = resolve("--rampup-batch-size 2 2 40 --global-batch-size 8", base=base)
    assert args.rampup_batch_size == [2, 2, 40]
    for wrong, words in (
        ("3 2 40", "multiples of"),
        ("2 4 40", "whole increments"),
        ("2 0 40", "positive increment"),
    ):
        with pytest.raises(ConfigError, match=words):
            resolve(f"--rampup-batch-size {wrong} --global-batch-size 8", base=base)
