"""Models: loading them, naming their parts, and running them with capture."""

import sys

# If the package `kernels` is installed, transformers downloads compiled code from the hub, even
# without `trust_remote_code`; with `peft`, it follows an adapter's configuration to other folders
# and repositories. These entries make Python treat both packages as missing.
sys.modules["kernels"] = None  # type: ignore[assignment]  # how Python blocks an import
sys.modules["peft"] = None  # type: ignore[assignment]
