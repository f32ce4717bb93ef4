"""Measurements of llmtasks on the reader's own machine: ``python -m benchmarks all``, or one by its own command.

They say what was measured and against what; nothing in the tests asserts a time.
"""
