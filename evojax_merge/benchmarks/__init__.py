"""Benchmarks of the device at hand, as `evojax-merge bench` runs them."""
