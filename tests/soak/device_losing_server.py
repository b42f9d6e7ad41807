"""`januslens-server` with a device that is lost at the next request while a file exists.

`python -m tests.soak.device_losing_server FILE --processes 2 ...` raises what torch raises when a
GPU fails for good; everything else is the real server.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from januslens_server.__main__ import main
from januslens_server.config import ServerSettings
from januslens_server.processes import child

FILE = "TEST_DEVICE_IS_LOST"

enter_unchanged = child.enter


def enter(
    number: int, settings: ServerSettings, folder: Path, pipe: Connection, models: Any
) -> None:
    """The real server process, with a device that can be lost."""
    import torch

    from januslens_server.models import failures

    def lose(*_: Any) -> None:
        if Path(os.environ[FILE]).exists():
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    torch.nn.modules.module.register_module_forward_hook(lose)
    failures.service_error = partial(
        failures.service_error, works=lambda: not Path(os.environ[FILE]).exists()
    )
    enter_unchanged(number, settings, folder, pipe, models)


if __name__ == "__main__":
    os.environ[FILE] = sys.argv.pop(1)
    child.enter = enter
    main()
