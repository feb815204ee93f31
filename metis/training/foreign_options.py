"""Options of Megatron-LM's trainer that are not honoured here: accepted without effect, or refused.

One idea: a launch script written for Megatron-LM should either run and mean the same, or stop with one line
that says why and what to write instead. `IGNORED` holds spellings whose presence cannot change what is
trained (deprecated, or services outside the training itself). `REFUSED` and `REFUSED_PREFIXES` hold requests
that would change the run; `REFUSED_VALUES` single values of options that are otherwise honoured.

Trap: nothing here reaches the parsed arguments; a module that wants one of these options must move it to the
table in `options.py` first.
"""

from __future__ import annotations

IGNORED: dict[str, bool] = {
    # spelling -> whether a value follows
    "--use-mcore-models": False,
    "--use-flash-attn": False,
    "--log-batch-size-to-tensorboard": False,
    "--log-learning-rate-to-tensorboard": False,
    "--use-dist-ckpt": False,
    "--dist-ckpt-format": True,
    "--auto-detect-ckpt-format": False,
    # megatron-core 0.16.1 casts the residual back to the layers' dtype at every addition.
    "--fp32-residual-connection": False,
    "--ckpt-fully-parallel-save": False,
    "--ckpt-assume-constant-structure": False,
    "--use-cpu-initialization": False,
    "--local-rank": True,
    "--lazy-mpu-init": True,
    "--no-async-tensor-model-parallel-allreduce": False,
    "--no-scatter-gather-tensors-in-pipeline": False,
    "--te-rng-tracker": False,
    "--disable-msc": False,
    "--rerun-mode": True,
    "--log-energy": False,
    "--log-straggler": False,
    "--disable-straggler-on-startup": False,
    "--straggler-ctrlr-port": True,
    "--straggler-minmax-count": True,
    "--log-memory-interval": True,
    "--log-device-memory-used": False,
    "--no-barrier-with-level-1-timing": False,
    "--no-one-logger": False,
    "--one-logger-project": True,
    "--one-logger-run-name": True,
    "--one-logger-async": False,
    "--app-tag-run-name": True,
    "--app-tag-run-version": True,
    "--enable-ft-package": False,
    "--calc-ft-timeouts": False,
    "--adlr-autoresume": False,
    "--adlr-autoresume-interval": True,
    "--patch-tokenizer-type": True,
    "--extra-vocab-size": True,
    "--dataset": True,
}

_RECIPE = "precision of the linears is chosen with --recipe NAME|FILE and --policy FILE"
_DENSE = "only dense LLaMA-type models are trained here; remove the option"
_MLP = "the MLP is SwiGLU (--swiglu) or GELU; remove the option"
_FSDP = "only data parallelism with --use-distributed-optimizer is offered; remove the option"
_ADAM = "optimizer state is fp32 AdamW on the training device; remove the option"
_OVERLAP = "--tp-comm-overlap has no parts to choose from here; remove the option"
_CONVERT = "checkpoints are torch_dist only; convert others with the tools of this project"
_SCOPE = "not part of LLaMA pretraining as offered here; remove the option"

REFUSED: dict[str, str] = {
    "--batch-size": "use --micro-batch-size",
    "--warmup": "use --lr-warmup-fraction",
    "--model-parallel-size": "use --tensor-model-parallel-size",
    "--checkpoint-activations": "use --recompute-activations or --recompute-granularity",
    "--encoder-num-layers": "use --num-layers",
    "--decoder-num-layers": "use --num-layers",
    "--encoder-seq-length": "use --seq-length",
    "--decoder-seq-length": "use --seq-length",
    "--no-position-embedding": "use --position-embedding-type",
    "--use-legacy-models": "only megatron-core models exist here; remove the option",
    "--yaml-cfg": "give the settings as options; a recipe file goes to --recipe",
    "--fp4-param-gather": _RECIPE,
    "--fp4-quantizer-factory": _RECIPE,
    "--te-precision-config-file": _RECIPE,
    "--num-experts": _DENSE,
    "--multi-latent-attention": _DENSE,
    "--window-size": _DENSE,
    "--apply-layernorm-1p": _DENSE,
    "--is-hybrid-model": _DENSE,
    "--squared-relu": _MLP,
    "--openai-gelu": _MLP,
    "--quick-geglu": _MLP,
    "--use-megatron-fsdp": _FSDP,
    "--use-custom-fsdp": _FSDP,
    "--use-torch-fsdp2": _FSDP,
    "--data-parallel-sharding-strategy": _FSDP,
    "--num-distributed-optimizer-instances": _FSDP,
    "--use-precision-aware-optimizer": _ADAM,
    "--main-grads-dtype": _ADAM,
    "--main-params-dtype": _ADAM,
    "--exp-avg-dtype": _ADAM,
    "--exp-avg-sq-dtype": _ADAM,
    "--optimizer-cpu-offload": _ADAM,
    "--pipeline-model-parallel-layout": "use --decoder-first-pipeline-num-layers and "
    "--decoder-last-pipeline-num-layers for uneven stages",
    "--microbatch-group-size-per-virtual-pipeline-stage": "micro batches are grouped by the pipeline size",
    "--use-tp-pp-dp-mapping": "ranks are ordered tp-cp-dp-pp; remove the option",
    "--disable-gloo-process-groups": "checkpoints need gloo groups; remove the option",
    "--nccl-communicator-config-path": "configure NCCL through its environment variables",
    "--cpu-offloading-num-layers": "use --recompute-granularity to save memory",
    "--distribute-saved-activations": "use --sequence-parallel to save memory",
    "--enable-cuda-graph": "use --cuda-graph-impl local",
    "--external-cuda-graph": "use --cuda-graph-impl local",
    "--fake-process-group": "use --print-config, which needs no cluster",
    "--perform-rl-step": _SCOPE,
    "--sft": _SCOPE,
    "--inprocess-restart": "restart the job; it resumes from --load",
    "--replication": _CONVERT,
}

REFUSED_PREFIXES: dict[str, str] = {
    "--moe-": _DENSE,
    "--mtp-": _DENSE,
    "--mamba-": _DENSE,
    "--hybrid-": _DENSE,
    "--heterogeneous-": _DENSE,
    "--retro-": _DENSE,
    "--fp8-": _RECIPE,
    "--no-fp8-": _RECIPE,
    "--kitchen-": _RECIPE,
    "--fsdp-": _FSDP,
    "--torch-fsdp2-": _FSDP,
    "--tp-comm-overlap-": _OVERLAP,
    "--tp-comm-bootstrap-": _OVERLAP,
    "--no-tp-comm-": _OVERLAP,
    "--disable-tp-comm-": _OVERLAP,
    "--ckpt-convert-": _CONVERT,
    "--non-persistent-": "use --save-interval with --save-retain-interval or --keep-last-checkpoints",
    "--muon-": "the optimizer is AdamW; remove the option",
    "--inference-": _SCOPE,
    "--rl-": _SCOPE,
    "--grpo-": _SCOPE,
    "--dino-": _SCOPE,
    "--vision-": _SCOPE,
    "--fim-": _SCOPE,
    "--sft-": _SCOPE,
    "--inprocess-": "restart the job; it resumes from --load",
}

REFUSED_VALUES: dict[str, dict[str, str]] = {
    "--position-embedding-type": {
        "relative": "use rope; relative positions need an attention bias that no kernel here takes",
        "mrope": "use rope; mrope is for image inputs",
    },
    "--transformer-impl": {"inference_optimized": "use local or transformer_engine for training"},
    "--cp-comm-type": {
        "p2p": "use all_gather, the exchange that works without Transformer Engine",
        "a2a": "use all_gather, the exchange that works without Transformer Engine",
        "a2a+p2p": "use all_gather, the exchange that works without Transformer Engine",
        "allgather": "write it all_gather",
    },
    "--optimizer": {
        "sgd": "use adam; LLaMA pretraining is AdamW here",
        "muon": "use adam; LLaMA pretraining is AdamW here",
        "dist_muon": "use adam; LLaMA pretraining is AdamW here",
    },
    "--ckpt-format": {
        "torch": _CONVERT,
        "torch_dcp": "use torch_dist; torch_dcp belongs to FSDP",
        "fsdp_dtensor": "use torch_dist; fsdp_dtensor belongs to FSDP",
    },
    "--dataloader-type": {"external": "use single or cyclic; data come from indexed files"},
    "--fp4-recipe": {"custom": _RECIPE},
}


def refusal(flag: str) -> str | None:
    """Return why `flag` is refused and what to use instead, or None if it is not a known Megatron option."""
    if flag in REFUSED:
        return REFUSED[flag]
    return next((why for prefix, why in REFUSED_PREFIXES.items() if flag.startswith(prefix)), None)
