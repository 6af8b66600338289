"""The benchmark suite: correctness first, then time, providers side by side in interleaved rounds.

    bench_*     the benchmarks: providers, sizes, and what a right result is
    harness/    case: what is measured, with what; suite: runs benchmarks into rows; runner, process, worker: one
                provider, here or in its own process; clock and compare: rounds and ratios; gate and loop_gate
    peers/      the networks, and other libraries around them
    counts/     what is counted rather than timed: operations, launches, instructions and bytes of compiled kernels
    report/     Markdown, plots, and two runs side by side
    gpu_run     ten minutes of a GPU

`fastddpm bench` runs it; `pytest benchmarks` runs the same benchmarks under pytest-benchmark, which keeps a history.
The library imports nothing from here.
"""
