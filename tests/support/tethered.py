"""Processes that end with the one that started them, however that ends."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

# Asks the kernel for the signal, and becomes the command: prctl(PR_SET_PDEATHSIG, SIGKILL).
_TETHER = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the process that started this one has ended")
os.execvp(sys.argv[2], sys.argv[2:])
"""


def tethered(command: Sequence[str]) -> list[str]:
    """The command so that Linux kills it when the thread that starts it has ended.

    A killed test or benchmark unwinds nothing, and its servers would compute on beside whatever
    runs next. Elsewhere than on Linux the command is as it was.
    """
    if sys.platform != "linux":
        return [*command]
    return [sys.executable, "-I", "-S", "-c", _TETHER, str(os.getpid()), *command]
