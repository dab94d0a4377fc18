"""Measurements of peftstate against plain PEFT, run as ``python -m benchmarks.<name>``."""
