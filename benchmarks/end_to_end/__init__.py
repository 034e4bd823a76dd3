"""Whole rankings, timed and checked against float64."""
