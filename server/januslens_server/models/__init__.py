"""Models: loading them, naming their parts, and running them with capture."""

import sys

# If the package `kernels` is installed, transformers downloads compiled code from the hub, even
# without `trust_remote_code`. This entry makes Python treat the package as missing.
sys.modules["kernels"] = None  # type: ignore[assignment]  # how Python blocks an import
