"""Faults between a save and a load: what each one is, and what a load must make of it."""
