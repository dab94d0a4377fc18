"""Situations in which a reload could differ from the saved model, with plain PEFT and with us.

Each is defined once, in the modules `causes_…` (situations of the known causes) and `further_…`.
`python -m benchmarks.fidelity` runs them with both libraries; `tests/test_causes.py` runs the same
definitions with ours.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no outcome may depend on what is on the Hub
