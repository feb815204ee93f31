"""How fast it is: what `tools/benchmark/{kernels,linear,train_step}.py` measure, and how.

One idea: a number means something beside another one from the same run. So each benchmark measures its
ceiling (a copy, a bare product) and its BF16 counterpart in the same process or the same minutes, and reports
ratios.

    shapes          matrices, linears and models by name; torch-free
    timing          medians of single calls, the launch hidden behind queued work
    report          heading (device, versions, commit, command), one table, JSON
    kernel_cases    the kernels as data: name, call, bytes
    linear_cases    forward + backward of one linear by every contender, taken in turn
    step_runs       training steps, one process per contender; step_worker is that process
    step_profile    GPU time by category from a profiler trace
    ceilings        copy and product of this device
"""
