"""The soak: a mixed load on real processes, some of which are killed all the time, and what must hold afterwards.

``python -m tests.soak --seconds 180 --seed 7``. A seed repeats the acts and the load, not how they interleave.
"""
