"""``python -m peftstate``."""

from __future__ import annotations

from peftstate.cli.app import main

if __name__ == "__main__":
    main()
