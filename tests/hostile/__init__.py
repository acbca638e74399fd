"""Hostile input by the hundred: seeded requests, LoRA files, pictures and servers, and what has to hold after each.

`python -m tests.hostile --minutes 10 --seed 1` runs for as long as asked; `make test` runs the first few hundred.
"""
