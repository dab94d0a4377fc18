"""Folders that somebody made to do harm: what each one attacks, and what a load must make of it."""
