"""Benchmarks of Caprese: `caprese bench`."""
