"""Build a release from the last commit, and check it in clean environments.

`make release` runs it. It writes a source distribution, a wheel, the lock file and an SBOM
(CycloneDX) to `dist/`, and publishes nothing.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
import zipfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
DIST = ROOT / "dist"
TOOLS = Path(sys.executable).parent
PYTHONS = ("3.11", "3.12", "3.13")
IN_WHEEL = (
    "januslens/py.typed",
    "januslens/v1/service.proto",
    "januslens/v1/service_pb2.py",
    "januslens/viewer/assets/",
    "januslens_server/demo/model/model.safetensors",
)
QUESTION = """
import januslens, sys
with januslens.Client(sys.argv[1]) as client:
    print(client.trace("The capital of Japan is the city of").target().predicted)
"""


class ReleaseError(Exception):
    """A check of the release failed."""


def say(text: str) -> None:
    """Print a line of the report."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def run(*command: str | Path, cwd: Path = ROOT, **variables: str) -> str:
    """Run a command and return its output; raises ReleaseError with the output if it fails."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise ReleaseError(f"{' '.join(map(str, command))} failed:\n{done.stdout}")
    return done.stdout


def checked_version(source: Path) -> str:
    """Return the version, if the changelog and the contract's image agree with it."""
    version = str(tomllib.loads((source / "pyproject.toml").read_text())["project"]["version"])
    changelog = (source / "CHANGELOG.md").read_text()
    heading = re.search(r"^## \[(.+?)\](?: - (\d{4}-\d\d-\d\d))?$", changelog, re.MULTILINE)
    expected = "Unreleased" if ".dev" in version else version
    if heading is None or heading[1] != expected:
        found = heading[1] if heading else "no section"
        raise ReleaseError(f"CHANGELOG.md: expected [{expected}] first, found {found}")
    if ".dev" not in version and heading[2] is None:
        raise ReleaseError(f"CHANGELOG.md: [{version}] has no date; expected '- YYYY-MM-DD'")
    check_contract(source, final=".dev" not in version)
    return version


def check_contract(source: Path, *, final: bool) -> None:
    """Compare the contract with its image: it may only add to it, and a final version equals it."""
    buf, image = ROOT / ".venv" / "bin" / "buf", source / "protos" / "januslens.binpb"
    run(buf, "breaking", "--against", image, cwd=source)
    if final:
        built = source.with_name("contract.binpb")
        run(buf, "build", "--exclude-source-info", "--output", built, cwd=source)
        if built.read_bytes() != image.read_bytes():
            raise ReleaseError("protos/januslens.binpb is not the contract: run 'make contract'")


def committed(folder: Path) -> Path:
    """Write the last commit to a folder; raises ReleaseError if anything is not committed."""
    if run("git", "status", "--porcelain"):
        raise ReleaseError("the working tree has changes: commit them first")
    source = folder / "source"
    run("git", "clone", "--quiet", "--no-hardlinks", ROOT, source)
    return source


def build(source: Path) -> tuple[Path, Path]:
    """Build the source distribution, and the wheel from it; return their paths in `dist/`."""
    shutil.rmtree(DIST, ignore_errors=True)
    moment = run("git", "log", "-1", "--format=%ct").strip()  # equal commits, equal files
    run(TOOLS / "python", "-m", "build", "--outdir", DIST, cwd=source, SOURCE_DATE_EPOCH=moment)
    (wheel,), (sdist,) = DIST.glob("*.whl"), DIST.glob("*.tar.gz")
    run(TOOLS / "twine", "check", "--strict", wheel, sdist)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    for start in IN_WHEEL:
        if not any(name.startswith(start) for name in names):
            raise ReleaseError(f"the wheel lacks {start}")
    strays = [name for name in names if name.partition("/")[0] in {"tests", "demo_training"}]
    if strays:
        raise ReleaseError(f"the wheel has {strays[0]}: only the two packages belong into it")
    shutil.copy(source / "deploy" / "requirements.lock", DIST)
    return wheel, sdist


@dataclass(frozen=True)
class Environment:
    """A clean virtual environment."""

    bin: Path

    @classmethod
    def create(cls, python: Path, folder: Path, *requirements: str | Path) -> Environment:
        """Create it and install the requirements."""
        run(python, "-m", "venv", folder)
        run(
            folder / "bin" / "python",
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-compile",
            *requirements,
        )
        return cls(folder / "bin")


def interpreters() -> dict[str, Path]:
    """Return the interpreters of the supported versions: pyenv's, and those on PATH."""
    found = {}
    for version in PYTHONS:
        pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
        candidates = sorted(pyenv.glob(f"{version}.*/bin/python"))
        if on_path := shutil.which(f"python{version}"):
            candidates.append(Path(on_path))
        for candidate in candidates:
            asked = [
                str(candidate),
                "-c",
                "import sys, venv; print(*sys.version_info[:2], sep='.')",
            ]
            done = subprocess.run(asked, capture_output=True, text=True, check=False)
            if done.stdout.strip() == version:
                found[version] = candidate
                break
    if not found:
        raise ReleaseError(f"no Python of {', '.join(PYTHONS)} was found")
    return found


def write_sbom(environment: Environment, path: Path) -> int:
    """Write the SBOM of what the environment has installed; return the number of components."""
    command = ("environment", "--output-reproducible", "--of", "JSON", "--output-file", path)
    run(TOOLS / "cyclonedx-py", *command, environment.bin / "python")
    bom = json.loads(path.read_text())
    components = bom["components"]
    for component in components:  # the wheel was installed from a path of this machine
        references = component.get("externalReferences", [])
        kept = [found for found in references if not found["url"].startswith("file:")]
        component["externalReferences"] = kept
    path.write_text(json.dumps(bom, indent=2) + "\n")
    if not any(component["name"] == "torch" for component in components):
        raise ReleaseError(f"{path.name} does not list torch")
    return len(components)


def check_clients(wheel: Path, version: str, pythons: dict[str, Path], folder: Path) -> None:
    """Install the server on the oldest Python and the client on every one, and ask a question."""
    oldest, *_ = pythons
    say(f"installing the server on Python {oldest}")
    server = Environment.create(pythons[oldest], folder / "server", f"{wheel}[server,otel]")
    count = write_sbom(server, DIST / f"januslens-{version}.cdx.json")
    say(f"SBOM: {count} components")
    arguments = [server.bin / "januslens-server", "--port", "0", "--metrics-port", "0"]
    with (
        (folder / "log").open("w+") as log,
        subprocess.Popen(
            [str(part) for part in arguments], stdout=log, stderr=log, cwd=folder
        ) as process,
    ):
        try:
            address = serving(process, folder / "log")
            for number, python in pythons.items():
                home = folder / f"client-{number}"
                client = Environment.create(python, home, f"{wheel}[cli,analysis]")
                answer = run(client.bin / "python", "-c", QUESTION, address, cwd=folder).strip()
                models = run(client.bin / "januslens", "models", "--server", address, cwd=folder)
                if "Tokyo" not in answer or "READY" not in models:
                    raise ReleaseError(
                        f"Python {number}: unexpected answers {answer!r}, {models!r}"
                    )
                say(f"client on Python {number}: {answer}")
        finally:
            process.terminate()


def serving(process: subprocess.Popen[bytes], log: Path) -> str:
    """Wait until the server is ready and return its address."""
    deadline = time.monotonic() + 300
    while not re.search(r" ready$", log.read_text(), re.MULTILINE):
        if process.poll() is not None or time.monotonic() > deadline:
            raise ReleaseError(f"the server did not become ready:\n{log.read_text()}")
        time.sleep(0.2)
    match = re.search(r"serving on (\S+)", log.read_text())
    if match is None:
        raise ReleaseError(f"the server did not log its address:\n{log.read_text()}")
    return match[1]


def main() -> None:
    """Build and check; exit with 1 and the reason if a check fails."""
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            source = committed(folder)
            version = checked_version(source)
            say(f"version {version}: changelog and contract agree")
            wheel, sdist = build(source)
            say(f"built {sdist.name} and {wheel.name}")
            pythons = interpreters()
            check_clients(wheel, version, pythons, folder)
    except ReleaseError as error:
        sys.exit(f"release: {error}")
    missing = [number for number in PYTHONS if number not in pythons]
    if missing:
        sys.exit(
            f"release: NOT CHECKED on Python {', '.join(missing)}: no such interpreter was found"
        )
    say(f"{DIST.name}/ has the release; nothing was published")


if __name__ == "__main__":
    main()
