"""What a save, a load and a check cost, beside plain PEFT and other programs doing the same.

`python -m benchmarks.performance` measures it and writes `docs/performance.md`;
`python -m benchmarks.performance.profile` says where the time of one load or save goes.
"""
