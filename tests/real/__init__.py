"""Tests on published checkpoints, run by `make real`."""
