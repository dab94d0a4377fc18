"""The command line, ``peftstate`` or ``python -m peftstate``: one file a command."""
