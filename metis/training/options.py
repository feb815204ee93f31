"""The command line as data: every option the trainer honours, one row each.

One idea: names, meanings and defaults are those of Megatron-LM's own trainer (tag core_v0.16.1), so that a
launch script written for it works here. The last column, `by`, names the module that gives the option its
effect; an option that nobody honours is not in the table. What is accepted without effect or refused with a
reason stands in `foreign_options.py`.

Exceptions to Megatron's defaults: `--transformer-impl`, `--distributed-backend` and `--device` are `auto`,
`--eval-interval` is 1000 (Megatron has no default and divides by it), `--cp-comm-type` is `all_gather`, and
`--dist-ckpt-optim-fully-reshardable` is automatic.

Traps: the name in the parsed arguments (`dest`) is Megatron's and not always the option's own
(`--norm-epsilon` is `layernorm_epsilon`, `--fp4-format` is `fp4`); a `--no-...` switch stores False under the
positive name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Option:
    """One option: spelling(s), value type (None: a switch), default, what it does, which module honours it.

    `value` is the type of one value, `nargs` as in argparse; a switch stores `not default`. `low` and `high`
    bound the value inclusively. `choices` are the values that work here.
    """

    flags: tuple[str, ...]
    dest: str
    value: Callable[[str], Any] | None
    default: Any
    help: str
    by: str
    choices: tuple[Any, ...] | None = None
    nargs: str | int | None = None
    low: float | None = None
    high: float | None = None


def _opt(
    flags: str, value: Callable[[str], Any] | None, default: Any, text: str, by: str, **more: Any
) -> Option:
    names = tuple(flags.split("/"))
    dest = more.pop("dest", names[0].lstrip("-").replace("-", "_"))
    return Option(flags=names, dest=dest, value=value, default=default, help=text, by=by, **more)


def _switch(flags: str, text: str, by: str, **more: Any) -> Option:
    return _opt(flags, None, False, text, by, **more)


def _off(flags: str, dest: str, text: str, by: str) -> Option:
    return _opt(flags, None, True, text, by, dest=dest)


# fmt: off
_MODEL = (
    _opt("--preset", str, None, "shape and usual AdamW values of a public model; other options override it",
         "presets", choices=("llama3-8b", "llama3-70b", "llama3.2-1b", "tiny")),
    _opt("--num-layers", int, None, "transformer blocks (required)", "model", low=1),
    _opt("--hidden-size", int, None, "width of the residual stream (required)", "model", low=1),
    _opt("--ffn-hidden-size", int, None, "MLP width; none: 4h, or 8h/3 rounded down to 64 with --swiglu",
         "model", low=1),
    _opt("--num-attention-heads", int, None, "query heads (required)", "model", low=1),
    _switch("--group-query-attention", "fewer key/value heads than query heads (GQA)", "model"),
    _opt("--num-query-groups", int, 1, "key/value heads, read with --group-query-attention", "model", low=1),
    _opt("--kv-channels", int, None, "channels of one head; none: hidden size / heads", "model", low=1),
    _opt("--seq-length", int, None, "tokens per sample (required)", "model, data", low=1),
    _opt("--max-position-embeddings", int, None, "longest position, at least --seq-length (required)",
         "model",
         low=1),
    _opt("--position-embedding-type", str, "learned_absolute", "how positions enter", "model",
         choices=("learned_absolute", "rope", "none")),
    _switch("--use-rotary-position-embeddings", "old spelling of --position-embedding-type rope",
            "validation"),
    _opt("--rotary-base", int, 10000, "base of the rotary frequencies", "model", low=1),
    _opt("--rotary-percent", float, 1.0, "share of the head channels that are rotated", "model", low=0,
         high=1),
    _switch("--rotary-interleaved", "rotate neighbouring channels instead of halves", "model"),
    _opt("--rotary-seq-len-interpolation-factor", int, None, "divide positions by this", "model", low=1),
    _switch("--use-rope-scaling", "Llama 3.1 frequency scaling (low 1, high 4, original length 8192)",
            "model"),
    _opt("--rope-scaling-factor", float, 8.0, "factor of --use-rope-scaling", "model", low=1),
    _opt("--normalization", str, "LayerNorm", "norm layers", "model", choices=("LayerNorm", "RMSNorm")),
    _opt("--norm-epsilon", float, 1e-5, "added to the variance in norm layers", "model",
         dest="layernorm_epsilon", low=0),
    _switch("--qk-layernorm", "normalise queries and keys per head", "model"),
    _switch("--swiglu", "gated SiLU in the MLP", "model"),
    _off("--disable-bias-linear", "add_bias_linear", "no bias in linear layers", "model"),
    _switch("--add-qkv-bias", "bias in the QKV projection only", "model"),
    _switch("--untie-embeddings-and-output-weights", "separate output matrix", "model"),
    _opt("--attention-dropout", float, 0.1, "dropout probability of attention weights", "model", low=0,
         high=1),
    _opt("--hidden-dropout", float, 0.1, "dropout probability of the residual branches", "model", low=0,
         high=1),
    _opt("--init-method-std", float, 0.02, "standard deviation of the initial weights", "model", low=0),
    _opt("--make-vocab-size-divisible-by", int, 128, "pad the vocabulary to a multiple of this times TP",
         "preflight",
         low=1),
    _opt("--padded-vocab-size", int, None, "rows of the embedding; none: derived from the tokenizer", "model",
         low=1),
    _opt("--attention-backend", str, "auto", "attention kernel; fused and unfused need Transformer Engine",
         "model",
         choices=("auto", "flash", "fused", "unfused", "local")),
    _opt("--transformer-impl", str, "auto", "norms and attention from Transformer Engine, or torch only",
         "model",
         choices=("auto", "local", "transformer_engine")),
    _opt("--cuda-graph-impl", str, "none",
         "local: capture the passes of a step in CUDA graphs and replay them (small models)", "graphs",
         choices=("none", "local")),
    _opt("--cuda-graph-scope", str, "full_iteration", "what one graph holds: the passes of a step", "graphs",
         choices=("full_iteration",)),
    _opt("--cuda-graph-warmup-steps", int, 3, "steps before the first capture", "graphs", low=1),
    _opt("--spec", str, None,
         "MODULE NAME of a layer spec in place of ours, or of a function of (config, vp_stage) "
         "that returns one", "model", nargs="*"),
)

_RECIPE = (
    _opt("--recipe", str, "bf16", "how linears compute: bf16, nvfp4, metis, ... or a .yaml/.json file",
         "mcore"),
    _opt("--recipe-schedule", str, None,
         "YAML or JSON file of phases in which another recipe applies; none: one recipe all along",
         "schedule"),
    _opt("--policy", str, None, "where the recipe applies: 'all' or a file; none: all but the last blocks",
         "mcore"),
    _opt("--gemm-backend", str, "auto",
         "who multiplies FP4 operands; auto: scaled_mm on compute capability 10.x, else emulated",
         "gemm_backend", choices=("auto", "emulated", "scaled_mm", "transformer_engine")),
    _opt("--quantize-kernels", str, "auto",
         "who splits and quantises; auto: Triton kernels on CUDA, else plain PyTorch (same codes)",
         "gemm_backend", choices=("auto", "triton", "torch")),
    _opt("--weight-cache", str, "auto",
         "what kernels keep of a quantised weight within a step: its codes (0.6 bytes a weight), decoded for "
         "every product, or its decoded operand (2 bytes); same bits. auto: operands of less than 4 Mi "
         "weights per linear and rank, codes of larger ones. Merged heads: operands only", "gemm_backend",
         choices=("auto", "codes", "operand")),
    _opt("--fp4-format", str, None, "Megatron's spelling of --recipe nvfp4", "validation", dest="fp4",
         choices=("e2m1",)),
    _opt("--fp4-recipe", str, "nvfp4", "recipe meant by --fp4-format", "validation", choices=("nvfp4",)),
    _switch("--first-last-layers-bf16", "keep the first and last blocks in bf16, as counted below",
            "validation"),
    _opt("--num-layers-at-start-in-bf16", int, 1, "blocks; giving it implies --first-last-layers-bf16",
         "validation",
         low=0),
    _opt("--num-layers-at-end-in-bf16", int, 1, "blocks; giving it implies --first-last-layers-bf16",
         "validation",
         low=0),
    _opt("--nonfinite-operands", str, "stop",
         "NaN or infinity in an operand of a quantised GEMM: stop and name it, skip the step, or ignore it",
         "operand_guard", choices=("stop", "skip", "ignore")),
    _switch("--exact-reductions", "test mode: every sum a layout can split is formed in float64",
            "mcore, optimizer"),
)

_PARALLEL = (
    _opt("--tensor-model-parallel-size", int, 1, "ranks that share each linear (TP)", "initialize", low=1),
    _opt("--pipeline-model-parallel-size", int, 1, "pipeline stages (PP)", "initialize", low=1),
    _opt("--context-parallel-size", int, 1, "ranks that share each sequence (CP)", "initialize", low=1),
    _opt("--expert-model-parallel-size", int, 1, "accepted for dense models: 1", "validation", low=1, high=1),
    _opt("--expert-tensor-parallel-size", int, None, "accepted for dense models: 1", "validation", low=1,
         high=1),
    _opt("--num-layers-per-virtual-pipeline-stage", int, None,
         "blocks per virtual stage (interleaved schedule)",
         "model", low=1),
    _opt("--num-virtual-stages-per-pipeline-rank", int, None, "virtual stages per rank", "model", low=1),
    _opt("--decoder-first-pipeline-num-layers", int, None, "blocks on the first stage", "model", low=1),
    _opt("--decoder-last-pipeline-num-layers", int, None, "blocks on the last stage", "model", low=1),
    _switch("--account-for-embedding-in-pipeline-split", "count the embedding as one block", "model"),
    _switch("--account-for-loss-in-pipeline-split", "count the output layer as one block", "model"),
    _switch("--sequence-parallel", "shard activations between linears along the sequence; off when TP=1",
            "model"),
    _switch("--tp-comm-overlap", "send what --sequence-parallel gathers and scatters beside products",
            "overlap"),
    _opt("--cp-comm-type", str, ["all_gather"], "how context parallelism exchanges keys and values", "model",
         nargs="+", choices=("all_gather",)),
    _switch("--use-distributed-optimizer", "shard optimizer state over data parallel ranks", "optimizer"),
    _switch("--overlap-grad-reduce", "reduce gradients during backward", "model"),
    _switch("--overlap-param-gather", "gather parameters during forward", "model"),
    _off("--no-overlap-p2p-communication", "overlap_p2p_comm", "do not overlap stage-to-stage messages",
         "model"),
    _off("--no-align-grad-reduce", "align_grad_reduce", "let stages start gradient reduction on their own",
         "model"),
    _opt("--ddp-num-buckets", int, None, "gradient buckets", "model", low=1),
    _opt("--ddp-bucket-size", int, None, "parameters per gradient bucket", "model", low=1),
    _switch("--ddp-average-in-collective", "average inside the reduction", "model"),
    _opt("--distributed-backend", str, "auto", "communication library; auto: nccl on GPUs, gloo on CPUs",
         "initialize", choices=("auto", "nccl", "gloo")),
    _opt("--distributed-timeout-minutes", int, 10, "minutes until a collective is given up", "initialize",
         low=1),
    _opt("--distributed-timeout-seconds-after-init", int, None, "seconds, used after the first iteration",
         "initialize", low=1),
    _opt("--device", str, "auto", "auto: cuda when a GPU is visible", "initialize", choices=("auto", "cpu",
         "cuda")),
)

_BATCH = (
    _opt("--micro-batch-size", int, None, "samples per forward pass of one rank (required)", "loop", low=1),
    _opt("--global-batch-size", int, None, "samples per iteration; none: micro batch * DP", "loop", low=1),
    _opt("--rampup-batch-size", int, None, "START INCREMENT SAMPLES: grow the global batch", "loop", nargs=3,
         low=0),
    _opt("--train-iters", int, None, "iterations to train", "loop", low=0),
    _opt("--train-samples", int, None, "samples to train, instead of iterations", "loop", low=1),
    _opt("--exit-interval", int, None, "leave after an iteration divisible by this", "loop", low=1),
    _opt("--exit-duration-in-mins", int, None, "save and leave after this many minutes", "loop", low=1),
    _switch("--exit-signal-handler", "save and leave on --exit-signal", "signals"),
    _opt("--exit-signal", str, "SIGTERM", "signal to listen to", "signals",
         choices=("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGQUIT")),
    _opt("--iterations-to-skip", int, [], "iterations, counted from 0, whose batch is read without an update",
         "loop", nargs="+", low=0),
    _switch("--skip-train", "evaluate only", "loop"),
    _switch("--recompute-activations", "same as --recompute-granularity selective", "validation"),
    _opt("--recompute-granularity", str, None, "recompute in backward: whole blocks or chosen parts", "model",
         choices=("full", "selective")),
    _opt("--recompute-method", str, None, "with full: which blocks", "model", choices=("uniform", "block")),
    _opt("--recompute-num-layers", int, None, "with full: blocks per unit (uniform) or per stage (block)",
         "model",
         low=1),
    _opt("--recompute-modules", str, None, "with selective: parts to recompute; none: core_attn", "model",
         nargs="+",
         choices=("core_attn", "layernorm", "mlp")),
    _off("--no-check-for-nan-in-loss-and-grad", "check_for_nan_in_loss_and_grad", "go on past NaN or Inf",
         "loop"),
    _switch("--check-for-spiky-loss", "report a loss ten times the largest seen", "loop"),
    _switch("--check-for-large-grads", "report unexpectedly large gradients", "model"),
    _opt("--check-weight-hash-across-dp-replicas-interval", int, None, "iterations between replica checks",
         "loop",
         low=1),
    _switch("--manual-gc", "collect garbage at chosen iterations only", "loop"),
    _opt("--manual-gc-interval", int, 0, "iterations between collections; 0: never", "loop", low=0),
    _off("--no-manual-gc-eval/--disable-manual-gc-eval", "manual_gc_eval", "no collection around evaluation",
         "loop"),
    _opt("--empty-unused-memory-level", int, 0, "1: empty the GPU cache before, 2: also after the step",
         "loop",
         choices=(0, 1, 2)),
    _switch("--deterministic-mode", "deterministic kernels only (bitwise resume on GPUs)", "initialize"),
    _switch("--calculate-per-token-loss", "weigh losses by tokens instead of by micro batches", "loop"),
    _switch("--cross-entropy-loss-fusion", "fused cross entropy; the default on a GPU", "fusions"),
    _switch("--no-cross-entropy-loss-fusion", "GPU: cross entropy by plain operations", "fusions"),
    _switch("--no-persist-layer-norm", "GPU: RMSNorm by plain operations", "fusions"),
    _off("--no-masked-softmax-fusion", "masked_softmax_fusion", "no fused softmax", "model"),
    _off("--no-bias-gelu-fusion", "bias_gelu_fusion", "no fused bias and GELU", "model"),
    _off("--no-bias-swiglu-fusion", "bias_swiglu_fusion", "no fused bias and SwiGLU", "model"),
    _off("--no-bias-dropout-fusion", "bias_dropout_fusion", "no fused bias and dropout", "model"),
    _off("--no-rope-fusion", "apply_rope_fusion", "GPU: rotate query and key by plain operations", "fusions"),
    _off("--no-gradient-accumulation-fusion", "gradient_accumulation_fusion",
         "GPU: add weight gradients to the main gradient in a pass of their own", "fusions"),
)

_OPTIMIZER = (
    _opt("--optimizer", str, "adam", "AdamW", "optimizer", choices=("adam",)),
    _switch("--no-optimizer-fusion",
            "GPU without TE and Apex: AdamW, gradient norm, clipping and parameter copies tensor by tensor",
            "optimizer"),
    _opt("--lr", float, None, "peak learning rate (required)", "optimizer", low=0),
    _opt("--min-lr", float, 0.0, "learning rate at the end of the decay", "optimizer", low=0),
    _opt("--decoupled-lr", float, None, "peak learning rate of embedding and output layer", "optimizer",
         low=0),
    _opt("--decoupled-min-lr", float, None, "their learning rate at the end", "optimizer", low=0),
    _opt("--lr-decay-style", str, "linear", "shape of the decay", "optimizer",
         choices=("constant", "linear", "cosine", "inverse-square-root", "WSD")),
    _opt("--lr-decay-iters", int, None, "iterations of the decay; none: --train-iters", "optimizer", low=1),
    _opt("--lr-decay-samples", int, None, "samples of the decay; none: --train-samples", "optimizer", low=1),
    _opt("--lr-warmup-fraction", float, None, "share of the decay spent warming up", "optimizer", low=0,
         high=1),
    _opt("--lr-warmup-iters", int, 0, "iterations of linear warmup", "optimizer", low=0),
    _opt("--lr-warmup-samples", int, 0, "samples of linear warmup", "optimizer", low=0),
    _opt("--lr-warmup-init", float, 0.0, "learning rate where the warmup starts", "optimizer", low=0),
    _opt("--lr-wsd-decay-style", str, "exponential", "shape of the final decay of WSD", "optimizer",
         choices=("exponential", "linear", "cosine", "minus_sqrt")),
    _opt("--lr-wsd-decay-iters", int, None, "iterations of the final decay of WSD", "optimizer", low=1),
    _opt("--lr-wsd-decay-samples", int, None, "samples of the final decay of WSD", "optimizer", low=1),
    _opt("--weight-decay", float, 0.01, "decoupled weight decay", "optimizer", low=0),
    _opt("--start-weight-decay", float, None, "with --weight-decay-incr-style: first value", "optimizer",
         low=0),
    _opt("--end-weight-decay", float, None, "with --weight-decay-incr-style: last value", "optimizer", low=0),
    _opt("--weight-decay-incr-style", str, "constant", "how weight decay changes", "optimizer",
         choices=("constant", "linear", "cosine")),
    _opt("--adam-beta1", float, 0.9, "decay of the first moment", "optimizer", low=0, high=1),
    _opt("--adam-beta2", float, 0.999, "decay of the second moment", "optimizer", low=0, high=1),
    _opt("--adam-eps", float, 1e-8, "added to the root of the second moment", "optimizer", low=0),
    _opt("--clip-grad", float, 1.0, "largest global gradient norm; 0: no clipping", "optimizer", low=0),
    _switch("--override-opt_param-scheduler/--override-opt-param-scheduler",
            "on resume, schedule from the command line", "optimizer", dest="override_opt_param_scheduler"),
    _switch("--use-checkpoint-opt_param-scheduler/--use-checkpoint-opt-param-scheduler",
            "on resume, schedule from the checkpoint", "optimizer",
            dest="use_checkpoint_opt_param_scheduler"),
    _opt("--seed", int, 1234, "of initial weights, dropout, data order and stochastic rounding", "initialize",
         low=1, high=2**32 - 1),
)

_PRECISION = (
    _switch("--bf16", "parameters and activations in bfloat16", "model"),
    _switch("--fp16", "parameters and activations in float16, with a loss scale", "model"),
    _opt("--loss-scale", float, None, "static loss scale of fp16; none: dynamic", "optimizer", low=0),
    _opt("--initial-loss-scale", float, 2**32, "first dynamic loss scale", "optimizer", low=1),
    _opt("--min-loss-scale", float, 1.0, "smallest dynamic loss scale", "optimizer", low=0),
    _opt("--loss-scale-window", float, 1000, "steps until the loss scale grows", "optimizer", low=1),
    _opt("--hysteresis", int, 2, "overflows until the loss scale shrinks", "optimizer", low=1),
    _switch("--accumulate-allreduce-grads-in-fp32", "fp32 gradients; on with --bf16", "model"),
    _switch("--grad-reduce-in-bf16", "bf16 gradients with --bf16", "model"),
    _switch("--attention-softmax-in-fp32", "softmax in fp32", "model"),
)

_DATA = (
    _opt("--data-path", str, None, "prefixes of indexed data, or WEIGHT PREFIX pairs", "data", nargs="*"),
    _opt("--split", str, None, "train,valid,test shares of --data-path; none: 969, 30, 1", "data"),
    _opt("--train-data-path", str, None, "prefixes or pairs for training", "data", nargs="*"),
    _opt("--valid-data-path", str, None, "prefixes or pairs for validation", "data", nargs="*"),
    _opt("--test-data-path", str, None, "prefixes or pairs for testing", "data", nargs="*"),
    _opt("--data-args-path", str, None, "file that holds what --data-path would", "data"),
    _opt("--per-split-data-args-path", str, None, "JSON file with train, valid and test lists", "data"),
    _opt("--data-cache-path", str, None, "directory of the index cache; none: next to the data", "data"),
    _switch("--mock-data", "synthetic samples instead of files", "data"),
    _opt("--num-workers", int, 2, "loader processes per rank", "data", low=0),
    _opt("--dataloader-type", str, None, "single: in order; cyclic: shuffled epochs; none: single", "data",
         choices=("single", "cyclic")),
    _off("--no-mmap-bin-files", "mmap_bin_files", "read .bin files instead of mapping them", "data"),
    _switch("--reset-position-ids", "restart positions after each end of document", "data"),
    _switch("--reset-attention-mask", "do not attend across documents", "data"),
    _switch("--eod-mask-loss", "no loss on end-of-document tokens", "data"),
    _off("--no-create-attention-mask-in-dataloader", "create_attention_mask_in_dataloader",
         "causal attention without a mask tensor", "data"),
    _opt("--num-dataset-builder-threads", int, 1, "threads that build the index cache", "data", low=1),
    _opt("--tokenizer-type", str, None, "kind of tokenizer", "tokenizer",
         choices=("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer",
                  "HuggingFaceTokenizer", "TikTokenizer", "NullTokenizer")),
    _opt("--tokenizer-model", str, None, "model file, directory or hub name", "tokenizer"),
    _opt("--vocab-size", int, None,
         "of the NullTokenizer (plus one for end of document), or at least this many rows",
         "preflight, tokenizer", low=1),
    _opt("--vocab-file", str, None, "vocabulary of a Hugging Face tokenizer", "tokenizer"),
    _opt("--merge-file", str, None, "merges of a Hugging Face tokenizer", "tokenizer"),
    _opt("--tokenizer-metadata", str, None, "metadata file of the tokenizer", "tokenizer"),
    _opt("--tokenizer-special-tokens", str, None, "extra special tokens", "tokenizer", nargs="+"),
    _opt("--tiktoken-pattern", str, None, "llama3, v1 or v2; none: the file format's own",
         "tokenizer"),
    _opt("--tiktoken-num-special-tokens", int, 1000, "reserved ids; 1000 means 256 for a LLaMA-3 rank file",
         "tokenizer", low=0),
    _opt("--tiktoken-special-tokens", str, None, "named special tokens of a JSON rank file", "tokenizer",
         nargs="+"),
    _switch("--legacy-tokenizer", "Llama2Tokenizer puts BOS before every document", "tokenizer"),
    _switch("--tokenizer-sentencepiece-legacy", "legacy special tokens", "tokenizer"),
    _switch("--tokenizer-hf-use-fast", "fast Hugging Face tokenizer", "tokenizer"),
    _switch("--tokenizer-hf-include-special-tokens", "let it add special tokens", "tokenizer"),
    _switch("--trust-remote-code", "let it run code of its repository", "tokenizer"),
)

_CHECKPOINT = (
    _opt("--save", str, None, "directory to save to", "checkpointing"),
    _opt("--save-interval/--persistent-save-interval", int, None, "iterations between checkpoints", "loop",
         low=1),
    _opt("--save-retain-interval", int, None, "keep checkpoints at multiples of this", "checkpointing",
         low=1),
    _opt("--keep-last-checkpoints", int, None, "keep this many of the newest; none: all", "checkpointing",
         low=1),
    _opt("--load", str, None, "directory to resume from (the parent of iter_*)", "checkpointing"),
    _opt("--ckpt-step", int, None, "iteration to load instead of the newest", "checkpointing", low=0),
    _opt("--pretrained-checkpoint", str, None, "weights to start from when --load holds none",
         "checkpointing"),
    _switch("--finetune", "load weights only and start at iteration 0", "checkpointing"),
    _opt("--ckpt-format", str, "torch_dist", "checkpoint format", "checkpointing", choices=("torch_dist",)),
    _switch("--async-save", "write checkpoints in the background", "checkpointing"),
    _switch("--use-persistent-ckpt-worker", "one long-lived writer process (GPUs only)", "checkpointing"),
    _off("--no-ckpt-fully-parallel-save/--disable-ckpt-fully-parallel-save", "ckpt_fully_parallel_save",
         "replicas do not share the writing", "checkpointing"),
    _switch("--ckpt-fully-parallel-load", "replicas share the reading", "checkpointing"),
    _opt("--dist-ckpt-strictness", str, "assume_ok_unexpected", "what mismatching keys mean on load",
         "checkpointing",
         choices=("assume_ok_unexpected", "log_unexpected", "log_all", "raise_unexpected", "raise_all",
                  "return_unexpected", "return_all", "ignore_all")),
    _opt("--dist-ckpt-optim-fully-reshardable", None, None,
         "optimizer state loadable at any layout; none: up to 13B parameters", "checkpointing"),
    _opt("--no-save-optim", None, None, "leave the optimizer out", "checkpointing"),
    _opt("--no-save-rng", None, None, "leave random states out", "checkpointing"),
    _opt("--no-load-optim", None, None, "do not load the optimizer", "checkpointing"),
    _opt("--no-load-rng", None, None, "do not load random states", "checkpointing"),
    _switch("--use-checkpoint-args", "model shape, recipe and tokenizer from the checkpoint", "run_config"),
    _switch("--use-mp-args-from-checkpoint-args", "also the parallel layout", "run_config"),
    _off("--no-use-tokenizer-model-from-checkpoint-args/--disable-use-tokenizer-model-from-checkpoint-args",
         "use_tokenizer_model_from_checkpoint_args", "keep --tokenizer-model of the command line",
         "run_config"),
    _switch("--exit-on-missing-checkpoint", "error instead of a fresh start", "checkpointing"),
)

_LOGGING = (
    _opt("--eval-iters", int, 100, "iterations per evaluation", "loop", low=0),
    _opt("--eval-interval", int, 1000, "iterations between evaluations", "loop", low=1),
    _switch("--full-validation", "evaluate on the whole validation set", "loop"),
    _opt("--log-interval", int, 100, "iterations between log lines", "telemetry", low=1),
    _opt("--metrics-file", str, None, "JSON lines: one object per iteration and validation", "telemetry"),
    _opt("--log-quantization-interval", int, 0,
         "iterations between measurements of every quantised operand; 0: never", "quantization_log", low=0),
    _opt("--tensorboard-dir", str, None, "directory of TensorBoard events", "telemetry"),
    _opt("--tensorboard-log-interval", int, 1, "iterations between TensorBoard points", "telemetry", low=1),
    _opt("--tensorboard-queue-size", int, 1000, "pending TensorBoard events", "telemetry", low=1),
    _switch("--log-throughput", "TFLOP/s per GPU in the log line", "telemetry"),
    _switch("--log-params-norm", "norm of all parameters", "telemetry"),
    _switch("--log-num-zeros-in-grad", "zero entries of the gradient", "telemetry"),
    _switch("--log-progress", "progress.txt in the save directory", "telemetry"),
    _switch("--log-timers-to-tensorboard", "timers as TensorBoard scalars", "telemetry"),
    _switch("--log-validation-ppl-to-tensorboard", "validation perplexity", "telemetry"),
    _switch("--log-memory-to-tensorboard", "GPU memory", "telemetry"),
    _switch("--log-world-size-to-tensorboard", "number of ranks", "telemetry"),
    _off("--no-log-loss-scale-to-tensorboard/--disable-log-loss-scale-to-tensorboard",
         "log_loss_scale_to_tensorboard", "no loss scale", "telemetry"),
    _opt("--timing-log-level", int, 0, "detail of the timers", "telemetry", choices=(0, 1, 2)),
    _opt("--timing-log-option", str, "minmax", "timers over ranks", "telemetry", choices=("max", "minmax",
         "all")),
    _opt("--logging-level", int, None, "level of Python logging; none: $MEGATRON_LOGGING_LEVEL or 30",
         "telemetry"),
    _opt("--wandb-project", str, None, "Weights & Biases project", "telemetry"),
    _opt("--wandb-exp-name", str, None, "its run name", "telemetry"),
    _opt("--wandb-save-dir", str, None, "its local directory", "telemetry"),
    _opt("--wandb-entity", str, None, "its team", "telemetry"),
    _switch("--profile", "profile iterations (nsys, or torch with --use-pytorch-profiler)", "loop"),
    _opt("--profile-step-start", int, 10, "first profiled iteration", "loop", low=0),
    _opt("--profile-step-end", int, 12, "iteration after the last profiled one", "loop", low=1),
    _opt("--profile-ranks", int, [0], "ranks to profile", "loop", nargs="+", low=0),
    _switch("--use-pytorch-profiler", "torch's profiler, into --tensorboard-dir", "loop"),
    _switch("--record-memory-history", "record GPU allocations", "loop"),
    _opt("--memory-snapshot-path", str, "snapshot.pickle", "where allocations are written", "loop"),
    _switch("--print-config", "print the resolved run as JSON and exit", "accounting"),
)

# fmt: on
GROUPS: dict[str, tuple[Option, ...]] = {
    "model": _MODEL,
    "FP4 recipe": _RECIPE,
    "parallelism": _PARALLEL,
    "batch and training": _BATCH,
    "optimizer and schedule": _OPTIMIZER,
    "precision": _PRECISION,
    "data and tokenizer": _DATA,
    "checkpoint": _CHECKPOINT,
    "evaluation and logging": _LOGGING,
}
OPTIONS: tuple[Option, ...] = tuple(option for group in GROUPS.values() for option in group)
