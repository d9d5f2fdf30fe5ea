"""Measurements, run from a checkout: `caprese bench`."""
