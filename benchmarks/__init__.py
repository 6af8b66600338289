"""The benchmark suite: correctness first, then time, providers side by side in interleaved rounds.

    case        what is measured, and by whom: Case, Provider, Work, Subject
    compare     interleaved rounds, statistics, ratios pair by pair
    runner      a provider in this process; process and worker: one in a process of its own
    randn, q_sample, p_sample, unet, sampling, training_step, drop_in     the subjects
    gate        what a provider must have computed before it is timed
    suite       runs subjects into rows; merge joins runs; report, plots and readme write them down
    offline     the part that needs no GPU: instructions and bytes of the kernels

`fastddpm bench` runs it; `pytest benchmarks` runs the same subjects under pytest-benchmark, which keeps a history.
Nothing here is imported by the library.
"""
