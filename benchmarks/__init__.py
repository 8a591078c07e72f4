"""What FP8 on a CPU costs and gains, measured beside bfloat16 and beside what people use today.

    python -m benchmarks

runs everything and prints one table; each part also runs by itself (`python -m benchmarks.cpu_linear --help`).
None of this is a test: figures depend on the machine and on what else runs on it, so every one of them is taken
interleaved with its baseline in one run, and comes with the distance to what the machine can do.
"""
