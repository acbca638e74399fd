"""Measurements: each compares two ways in one run, prints ratios, and writes JSON to bench/results/."""
