"""Run the steps of the image's build without a container engine.

`python -m tests.deploy.build_steps` runs the instructions of the build stage in order, in an empty
folder, with a fresh virtual environment in place of the base image's Python. Then it runs the
image's entry point and health check with what was installed. It does not cover the base image, its
users, and the RUN instructions of the last stage.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from dataclasses import dataclass, field
from pathlib import Path

from tests.deploy import image
from tests.deploy.image import Instruction
from tests.support.server import running_server

ROOT = Path(__file__).parents[2]
BUILD_TOOLS = ("pip", "uv", "hatchling", "pytest", "ruff", "mypy", "gcc")


@dataclass
class Stage:
    """A build stage whose root is a folder."""

    root: Path
    variables: dict[str, str]
    folder: Path = field(init=False)

    def __post_init__(self) -> None:
        self.folder = self.root

    def run(self, instruction: Instruction) -> None:
        """Run one instruction; the caller handles `FROM`, and variables override an `ARG`."""
        match instruction.keyword:
            case "ARG":
                name, _, default = instruction.rest.partition("=")
                self.variables.setdefault(name, default)
            case "ENV":
                pairs = (pair.split("=", 1) for pair in instruction.rest.split())
                self.variables |= {name: self._within(value) for name, value in pairs}
            case "WORKDIR":
                self.folder = Path(self._within(instruction.rest))
                self.folder.mkdir(parents=True)
            case "COPY":
                *sources, destination = instruction.rest.split()
                for source in sources:
                    self._copy(source, self.folder / destination)
            case "RUN":
                print(f"RUN {instruction.rest}", flush=True)  # noqa: T201 - a build's own log
                subprocess.run(
                    ["sh", "-ec", instruction.rest],  # noqa: S607 - as an engine does
                    cwd=self.folder,
                    env=self.variables,
                    check=True,
                )

    def _within(self, path: str) -> str:
        return f"{self.root}{path}" if path.startswith("/") else path

    def _copy(self, source: str, destination: Path) -> None:
        if (ROOT / source).is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / source, destination, ignore=ignore)
        else:
            shutil.copy(ROOT / source, destination)


def python_of_the_base(folder: Path) -> dict[str, str]:
    """Yield variables with a Python and pip first on the path, as in the base image."""
    venv.create(folder, with_pip=True)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("VIRTUAL_ENV")}
    # Empty means torch's build from the default index. Named backends have separate indexes.
    kept |= {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "TORCH_BACKEND": ""}
    # uv does not read pip's configuration, which may name wheels on this machine.
    command = [str(folder / "bin" / "pip"), "config", "get", "global.find-links"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return kept | ({"UV_FIND_LINKS": found.stdout.strip()} if found.returncode == 0 else {})


def build_stage() -> list[Instruction]:
    """Return the instructions between the two FROM lines."""
    found = image.instructions()
    first, second = (i for i, instruction in enumerate(found) if instruction.keyword == "FROM")
    return found[first + 1 : second]


def check_what_runs(environment: Path) -> None:
    """Check that the entry point serves, the health check agrees, and no build tool is left."""
    programs = {path.name for path in (environment / "bin").iterdir()}
    assert not programs & set(BUILD_TOOLS), programs & set(BUILD_TOOLS)
    (entry,) = json.loads(image.value("ENTRYPOINT"))
    assert entry in programs
    config = ROOT / "deploy" / "base" / "januslens.yaml"
    flags = ("--host", "127.0.0.1", "--metrics-host", "127.0.0.1")
    with running_server(
        *flags,
        program=[str(environment / "bin" / entry)],
        environment={"JANUSLENS_CONFIG": str(config)},
    ) as server:
        host, _, port = server.address.rpartition(":")
        subprocess.run(
            [environment / "bin" / "python", ROOT / "deploy" / "healthcheck.py"],
            env=os.environ | {"JANUSLENS_HOST": host, "JANUSLENS_PORT": port},
            check=True,
        )
        server.process.terminate()
        assert server.process.wait(timeout=30) == 0


def main() -> None:
    """Build, then run the result."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        stage = Stage(root / "root", python_of_the_base(root / "base"))
        stage.root.mkdir()
        for instruction in build_stage():
            stage.run(instruction)
        check_what_runs(Path(stage.variables["VIRTUAL_ENV"]))
    sys.stdout.write("The build's steps run, and what they install serves.\n")


if __name__ == "__main__":
    main()
