"""Let idle OpenMP threads of torch sleep instead of spinning."""

from __future__ import annotations

import os

# Iterations that an idle thread of GNU OpenMP, part of torch's wheels, spins before it sleeps. The
# default of 300,000 takes 10 % of a trace's processor time, on a core that could
# project or encode meanwhile.
SPIN_COUNT = "1000"


def limit_spinning() -> None:
    """Set the spin count, unless the environment sets one; call it before torch is imported."""
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT
