"""Benchmarks: each verifies its candidates against one another, then times them in turn."""
