"""The pretraining runtime on megatron-core: arguments, data, model, optimizer, loop, checkpoints, telemetry.

`options`, `presets`, `arguments`, `validation`, `accounting` and `preflight` import neither torch nor
megatron, so that a wrong command line ends within a second. Everything else in this package may import both.
"""
