"""Slow, plain reference implementations the tests and the benchmark compare against."""
