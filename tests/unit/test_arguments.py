"""The command line: Megatron's names and defaults, what overrides what, and one clear line for every mistake.

Oracles: the defaults of Megatron-LM core_v0.16.1 (`MEGATRON_DEFAULTS`, taken from its parser), published
parameter counts, and FLOPs added up matrix by matrix.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from metis.errors import ConfigError
from metis.training import arguments
from metis.training.accounting import count_parameters, flops_per_iteration
from metis.training.arguments import build_parser, parse_args, print_args, validate_args
from metis.training.foreign_options import IGNORED, REFUSED, REFUSED_PREFIXES
from metis.training.options import OPTIONS

REPOSITORY = Path(__file__).resolve().parents[2]
ERROR_LIMIT_SECONDS = 2.0  # of processor time, so that a busy machine does not count; measured 0.3 s

# (default, options with that default; OPTION>DEST where dest is not the option's own name)
# fmt: off
MEGATRON_DEFAULTS = [
    (None, """
     --num-layers --hidden-size --ffn-hidden-size --num-attention-heads --kv-channels --seq-length
     --max-position-embeddings --rotary-seq-len-interpolation-factor --padded-vocab-size --spec
     --fp4-format>fp4 --expert-tensor-parallel-size --num-layers-per-virtual-pipeline-stage
     --num-virtual-stages-per-pipeline-rank --decoder-first-pipeline-num-layers
     --decoder-last-pipeline-num-layers --ddp-num-buckets --ddp-bucket-size
     --distributed-timeout-seconds-after-init --micro-batch-size --global-batch-size --rampup-batch-size
     --train-iters --train-samples --exit-interval --exit-duration-in-mins --recompute-granularity
     --recompute-method --recompute-num-layers --recompute-modules
     --check-weight-hash-across-dp-replicas-interval --lr --decoupled-lr --decoupled-min-lr --lr-decay-iters
     --lr-decay-samples --lr-warmup-fraction --lr-wsd-decay-iters --lr-wsd-decay-samples --start-weight-decay
     --end-weight-decay --loss-scale --data-path --split --train-data-path --valid-data-path --test-data-path
     --data-args-path --per-split-data-args-path --data-cache-path --dataloader-type --tokenizer-type
     --tokenizer-model --vocab-size --vocab-file --merge-file --tokenizer-metadata --tokenizer-special-tokens
     --tiktoken-pattern --tiktoken-special-tokens --save --save-interval
     --persistent-save-interval>save_interval --save-retain-interval --load --ckpt-step
     --pretrained-checkpoint --no-save-optim --no-save-rng --no-load-optim --no-load-rng --tensorboard-dir
     --logging-level --wandb-project --wandb-exp-name --wandb-save-dir --wandb-entity
     """),
    (False, """
     --group-query-attention --use-rotary-position-embeddings --rotary-interleaved --use-rope-scaling
     --qk-layernorm --swiglu --add-qkv-bias --untie-embeddings-and-output-weights --first-last-layers-bf16
     --account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split --sequence-parallel
     --tp-comm-overlap
     --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --ddp-average-in-collective
     --exit-signal-handler --skip-train --recompute-activations --check-for-spiky-loss --check-for-large-grads
     --manual-gc --deterministic-mode --calculate-per-token-loss --cross-entropy-loss-fusion
     --no-persist-layer-norm
     --override-opt_param-scheduler --override-opt-param-scheduler --use-checkpoint-opt_param-scheduler
     --use-checkpoint-opt-param-scheduler --bf16 --fp16 --accumulate-allreduce-grads-in-fp32
     --grad-reduce-in-bf16 --attention-softmax-in-fp32 --mock-data
     --reset-position-ids --reset-attention-mask --eod-mask-loss --legacy-tokenizer
     --tokenizer-sentencepiece-legacy --tokenizer-hf-use-fast --tokenizer-hf-include-special-tokens
     --trust-remote-code --finetune --async-save --use-persistent-ckpt-worker --ckpt-fully-parallel-load
     --use-checkpoint-args --use-mp-args-from-checkpoint-args
     --exit-on-missing-checkpoint --full-validation --log-throughput --log-params-norm --log-num-zeros-in-grad
     --log-progress --log-timers-to-tensorboard --log-validation-ppl-to-tensorboard
     --log-memory-to-tensorboard --log-world-size-to-tensorboard --profile --use-pytorch-profiler
     --record-memory-history
     """),
    (1, """
     --num-query-groups --num-layers-at-start-in-bf16 --num-layers-at-end-in-bf16 --tensor-model-parallel-size
     --pipeline-model-parallel-size --context-parallel-size --expert-model-parallel-size
     --num-dataset-builder-threads --tensorboard-log-interval
     """),
    ("learned_absolute", "--position-embedding-type"),
    (10000, "--rotary-base"),
    (1.0, "--rotary-percent --clip-grad --min-loss-scale"),
    (8.0, "--rope-scaling-factor"),
    ("LayerNorm", "--normalization"),
    (1e-05, "--norm-epsilon>layernorm_epsilon"),
    (True, """
     --disable-bias-linear>add_bias_linear --no-overlap-p2p-communication>overlap_p2p_comm
     --no-align-grad-reduce>align_grad_reduce
     --no-check-for-nan-in-loss-and-grad>check_for_nan_in_loss_and_grad --no-manual-gc-eval>manual_gc_eval
     --disable-manual-gc-eval>manual_gc_eval --no-masked-softmax-fusion>masked_softmax_fusion
     --no-bias-gelu-fusion>bias_gelu_fusion --no-bias-swiglu-fusion>bias_swiglu_fusion
     --no-bias-dropout-fusion>bias_dropout_fusion --no-rope-fusion>apply_rope_fusion
     --no-gradient-accumulation-fusion>gradient_accumulation_fusion --no-mmap-bin-files>mmap_bin_files
     --no-create-attention-mask-in-dataloader>create_attention_mask_in_dataloader
     --no-ckpt-fully-parallel-save>ckpt_fully_parallel_save
     --disable-ckpt-fully-parallel-save>ckpt_fully_parallel_save
     --no-use-tokenizer-model-from-checkpoint-args>use_tokenizer_model_from_checkpoint_args
     --disable-use-tokenizer-model-from-checkpoint-args>use_tokenizer_model_from_checkpoint_args
     --no-log-loss-scale-to-tensorboard>log_loss_scale_to_tensorboard
     --disable-log-loss-scale-to-tensorboard>log_loss_scale_to_tensorboard
     """),
    (0.1, "--attention-dropout --hidden-dropout"),
    (0.02, "--init-method-std"),
    (128, "--make-vocab-size-divisible-by"),
    ("nvfp4", "--fp4-recipe"),
    (10, "--distributed-timeout-minutes --profile-step-start"),
    ([], "--iterations-to-skip"),
    (0, """
     --manual-gc-interval --empty-unused-memory-level --lr-warmup-iters --lr-warmup-samples --timing-log-level
     """),
    ("adam", "--optimizer"),
    (0.0, "--min-lr --lr-warmup-init"),
    ("linear", "--lr-decay-style"),
    ("exponential", "--lr-wsd-decay-style"),
    (0.01, "--weight-decay"),
    ("constant", "--weight-decay-incr-style"),
    (0.9, "--adam-beta1"),
    (0.999, "--adam-beta2"),
    (1e-08, "--adam-eps"),
    (1234, "--seed"),
    (4294967296, "--initial-loss-scale"),
    (1000, "--loss-scale-window --tiktoken-num-special-tokens --tensorboard-queue-size"),
    (2, "--hysteresis --num-workers"),
    ("torch_dist", "--ckpt-format"),
    ("assume_ok_unexpected", "--dist-ckpt-strictness"),
    (100, "--eval-iters --log-interval"),
    ("minmax", "--timing-log-option"),
    (12, "--profile-step-end"),
    ([0], "--profile-ranks"),
    ("snapshot.pickle", "--memory-snapshot-path"),
    (3, "--cuda-graph-warmup-steps"),
    ("none", "--cuda-graph-impl"),
]
# fmt: on

OUR_DEFAULTS = {
    "attention_backend": "auto",
    "transformer_impl": "auto",
    "cp_comm_type": ["all_gather"],
    "cuda_graph_scope": "full_iteration",
    "distributed_backend": "auto",
    "exit_signal": "SIGTERM",
    "dist_ckpt_optim_fully_reshardable": None,
    "eval_interval": 1000,
    "preset": None,
    "recipe": "bf16",
    "recipe_schedule": None,
    "policy": None,
    "exact_reductions": False,
    "no_cross_entropy_loss_fusion": False,
    "no_optimizer_fusion": False,
    "gemm_backend": "auto",
    "quantize_kernels": "auto",
    "weight_cache": "auto",
    "device": "auto",
    "keep_last_checkpoints": None,
    "metrics_file": None,
    "log_quantization_interval": 0,
    "nonfinite_operands": "stop",
    "print_config": False,
}

TINY = "--preset tiny --mock-data --vocab-size 1000 --micro-batch-size 2 --lr 1e-3 --train-iters 10"


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)


def resolve(extra: str = "", *, base: str = TINY, world_size: int = 1):
    args = parse_args([*base.split(), *extra.split()])
    validate_args(args, world_size)
    return args


def megatron_defaults():
    for default, options in MEGATRON_DEFAULTS:
        for option in options.split():
            flag, _, dest = option.partition(">")
            yield flag, dest or flag[2:].replace("-", "_"), default


def test_defaults_equal_megatron():
    args = parse_args([])
    flags = {flag for option in OPTIONS for flag in option.flags}
    for flag, dest, default in megatron_defaults():
        assert flag in flags
        value = getattr(args, dest)
        assert value == default and type(value) is type(default), flag


def test_every_option_is_megatrons_or_a_listed_exception():
    known = {dest for _, dest, _ in megatron_defaults()}
    args = parse_args([])
    assert {option.dest for option in OPTIONS} - known == set(OUR_DEFAULTS)
    assert {name: getattr(args, name) for name in OUR_DEFAULTS} == OUR_DEFAULTS


def test_dest_of_every_switch_flips():
    for option in OPTIONS:
        if option.value is None:
            for flag in option.flags:
                parsed = build_parser().parse_args([flag])
                assert vars(parsed) == {option.dest: option.default is not True}


def test_arguments_are_plain_values():
    json.dumps(vars(resolve("--recipe metis")))


def test_help_names_every_option_once_with_its_default():
    text = " ".join(build_parser().format_help().split())
    for option in OPTIONS:
        assert option.flags[0] in text
    assert text.count("[default: ") == len(OPTIONS)


# --- presets ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [("llama3-8b", 8_030_261_248), ("llama3-70b", 70_553_706_496), ("llama3.2-1b", 1_235_814_400)],
)
def test_preset_has_the_published_number_of_parameters(preset, parameters):
    args = resolve("--mock-data --train-iters 1 --lr 1e-4", base=f"--preset {preset} --micro-batch-size 1")
    assert count_parameters(args) == parameters
    assert args.padded_vocab_size == 128256


def test_explicit_option_beats_preset_even_when_it_repeats_the_default():
    args = resolve("--rotary-base 10000 --adam-beta2 0.999 --normalization LayerNorm")
    assert (args.rotary_base, args.adam_beta2, args.normalization) == (10000, 0.999, "LayerNorm")
    assert args.hidden_size == 256
    assert {"rotary_base", "adam_beta2", "normalization"} <= set(args.given)


def test_gpt2_small_has_the_published_number_of_parameters():
    """Biases, LayerNorm, learned positions and tied embeddings, all of them Megatron's defaults."""
    args = resolve(
        base="--num-layers 12 --hidden-size 768 --num-attention-heads 12 --seq-length 1024 "
        "--lr 1e-4 --mock-data --max-position-embeddings 1024 --micro-batch-size 1 "
        "--train-iters 1 --padded-vocab-size 50257 --vocab-size 50256"
    )
    assert count_parameters(args) == 124_439_808


def test_flops_are_the_sum_over_matrices():
    args = resolve()
    tokens = 3 * args.seq_length
    per_block = [(256, 256), (256, 128), (256, 128), (256, 256), (256, 704), (256, 704), (704, 256)]
    forward = sum(2 * tokens * k * n for k, n in per_block)
    forward += 2 * (2 * tokens * args.seq_length * 256) // 2  # Q K^T and P V, causal half
    forward = args.num_layers * forward + 2 * tokens * 256 * args.padded_vocab_size
    assert flops_per_iteration(args, 3) == 3 * forward


# --- printing ---------------------------------------------------------------------------------------------


def test_print_config_counts_quantized_linears_and_needs_no_launcher():
    command = (
        "--preset llama3-8b --micro-batch-size 1 --global-batch-size 128 --tensor-model-parallel-size 4 "
    )
    result = run_script(f"{command} --pipeline-model-parallel-size 2 --recipe metis --bf16 --print-config")
    assert result.returncode == 0
    config = json.loads(result.stdout)
    assert config["parallel"]["world_size"] == 8 and config["parallel"]["data_parallel_size"] == 1
    assert config["tokens_per_iteration"] == 128 * 8192
    assert (config["num_linears"], config["num_quantized_linears"]) == (128, 112)
    assert config["recipe"]["name"] == "metis" and len(config["recipe"]["cells"]) == 6
    assert config["parameters"] == 8_030_261_248 + 2 * 4096 * (128512 - 128256)  # padded to 128 * TP


def test_print_args_is_sorted_between_rulers(capsys):
    print_args(resolve())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "-" * 24 + " arguments " + "-" * 24
    assert lines[-1] == "-" * 20 + " end of arguments " + "-" * 21
    assert "  hidden_size " + "." * 37 + " 256" in lines
    names = [line.split()[0].lower() for line in lines[1:-1]]
    assert names == sorted(names)


# --- accepted without effect, refused


def test_ignored_options_change_nothing_but_one_warning(capsys):
    plain = vars(parse_args(TINY.split()))
    capsys.readouterr()
    options = [part for flag, has_value in IGNORED.items() for part in ([flag, "1"] if has_value else [flag])]
    assert vars(parse_args([*TINY.split(), *options])) == plain
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1 and all(flag in warning for flag in IGNORED)


def test_ignored_and_refused_do_not_overlap_the_table():
    flags = {flag for option in OPTIONS for flag in option.flags}
    assert not flags & (set(IGNORED) | set(REFUSED))
    assert not set(IGNORED) & set(REFUSED)
    assert not [flag for flag in flags if flag.startswith(tuple(REFUSED_PREFIXES))]


# --- launchers --------------------------------------------------------------------------------------------


def test_torchrun_environment(monkeypatch):
    for name, value in (("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    args = parse_args(TINY.split())
    assert (args.rank, args.world_size, args.local_rank) == (5, 8, 1)


def test_srun_environment_becomes_torchruns():
    env = {
        "SLURM_PROCID": "9",
        "SLURM_NTASKS": "16",
        "SLURM_LOCALID": "1",
        "SLURM_JOB_NODELIST": "gpu[007-009,012],x1",
        "SLURM_JOB_ID": "123",
    }
    assert arguments._launch_environment(env, parse_args([])) == (9, 16, 1)
    assert (env["RANK"], env["MASTER_ADDR"], env["MASTER_PORT"]) == ("9", "gpu007", "29623")
    env = {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1"}
    arguments._launch_environment(env, parse_args([]))
    assert (env["MASTER_ADDR"], env["MASTER_PORT"]) == ("10.0.0.1", "1")


def test_single_process_tools_pass_over_slurms_variables_but_not_torchruns(monkeypatch):
    for name, value in (("SLURM_PROCID", "0"), ("SLURM_NTASKS", "8"), ("SLURM_JOB_NODELIST", "gpu1")):
        monkeypatch.setenv(name, value)
    assert parse_args(TINY.split(), single_process=True).world_size == 1
    assert "RANK" not in os.environ and "MASTER_ADDR" not in os.environ
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert parse_args(TINY.split(), single_process=True).world_size == 2


def test_wrong_rank_variable_is_named(monkeypatch):
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(ConfigError, match=r"\$RANK"):
        parse_args([])


# --- speed ------------------------------------------------------------------------------------------------

SCRIPT = """
import sys
from metis.errors import MetisError, report_and_exit
from metis.training.accounting import print_config
from metis.training.arguments import parse_args, validate_args
from metis.training.preflight import preflight
try:
    args = parse_args()
    validate_args(args, args.world_size)
    if args.print_config:
        print_config(args)
    else:
        preflight(args)
except MetisError as error:
    report_and_exit(error)
finally:
    slow = sorted({name.split(".")[0] for name in sys.modules} & {"torch", "megatron", "numpy"})
    assert not slow, slow
"""


def run_script(options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", SCRIPT, *options.split()]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False)


def test_nothing_slow_is_imported_and_an_error_comes_at_once():
    assert run_script(TINY + " --recipe metis").returncode == 0
    before = os.times()
    result = run_script(TINY + " --hidden-sice 3")
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    assert used < ERROR_LIMIT_SECONDS
    assert result.returncode == 2
    assert result.stderr.startswith("error: --hidden-sice: ") and result.stderr.count("\n") == 1
