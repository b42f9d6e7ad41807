"""How torch's own threads wait for their next operation."""

from __future__ import annotations

import os

# Turns of the loop in which a thread of GNU's OpenMP, which torch's wheels bring, waits awake
# before it sleeps: some microseconds. Its own 300,000, on a core that could project or encode
# meanwhile, are a tenth of a trace's processor time.
WAITING_TURNS = "1000"


def let_waiting_threads_sleep() -> None:
    """Say so before torch is imported, unless whoever started this process has said otherwise."""
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = WAITING_TURNS
