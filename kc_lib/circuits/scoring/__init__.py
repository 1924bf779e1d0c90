"""The formulas: one file for each way to score edges, each held against a slow oracle in the tests."""
