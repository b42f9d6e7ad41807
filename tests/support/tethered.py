"""Start processes that end with their parent, even if it is killed."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

# Requests the signal from the kernel with prctl(PR_SET_PDEATHSIG, SIGKILL), then runs the command.
_TETHER = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the process that started this one has ended")
os.execvp(sys.argv[2], sys.argv[2:])
"""


def tethered(command: Sequence[str]) -> list[str]:
    """Extend a command so that Linux kills it when the thread that started it ends.

    A test or benchmark that is killed runs no cleanup, so its servers would compete with the next
    run. On other systems the command is unchanged.
    """
    if sys.platform != "linux":
        return [*command]
    return [sys.executable, "-I", "-S", "-c", _TETHER, str(os.getpid()), *command]
