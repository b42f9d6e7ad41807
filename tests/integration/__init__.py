"""Tests of a running server: start, metrics, load, faults and stop."""
