"""Benchmarks against the peer, as ratios: ``make bench``, or ``make bench-quick`` for a smoke test.

Both programs work on the same images in turn, so that what the machine does meanwhile falls on both alike. A ratio
above one means that qmpd is faster. ``BENCH_SCALE`` (1.0) scales all sizes, ``BENCH_RUNS`` (5) is the number of runs of
each, ``BENCH_DIR`` says where the images go.
"""
