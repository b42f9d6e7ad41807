"""Resident models: loading, what their parts are called, and running them with capture."""

import sys

# transformers loads compiled kernels from the hub where this package is installed, whatever
# `trust_remote_code` says. With None in its place it counts as not installed.
sys.modules["kernels"] = None  # type: ignore[assignment]  # how Python blocks an import
