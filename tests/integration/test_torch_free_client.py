"""The client works in an environment without torch."""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PROMPT = "The capital of Japan is the city of"

USE = """
import sys
import januslens

with januslens.Client(sys.argv[1], timeout=60) as client:
    (model,) = client.list_models()
    print(model.name, model.n_layers)
    print([token.text for token in client.tokenize("The capital of Japan")])
    trace = client.trace("The capital of Japan is the city of")
    print(trace.target().target.text, len(trace.layers))
    gradient = client.gradient_lens("The capital of Japan is the city of", " Paris")
    print(len(gradient.matrices))
"""


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts of an environment with the project and its extra `cli` alone."""
    folder = tmp_path_factory.mktemp("client")
    venv.create(folder)
    pip = [sys.executable, "-m", "pip", "--python", f"{folder}/bin/python"]
    quick = ["--quiet", "--no-compile", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", *quick, f"{ROOT}[cli]"], check=True, timeout=300)
    return folder / "bin"


def ran(command: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command of that environment, away from this checkout."""
    return subprocess.run(
        [command, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=command.parent,
        env={"PATH": "/usr/bin:/bin", "COLUMNS": "100"},
        check=False,
    )


@pytest.mark.slow
def test_the_environment_has_no_torch(scripts: Path) -> None:
    found = ran(scripts / "python", "-c", "import torch")
    assert found.returncode != 0
    assert "No module named 'torch'" in found.stderr


@pytest.mark.slow
def test_the_library_works_with_the_server(scripts: Path, server_address: str) -> None:
    used = ran(scripts / "python", "-c", USE, server_address)
    assert used.stderr == ""
    assert used.stdout.splitlines() == [
        "demo 4",
        "['The', ' capital', ' of', ' Japan']",
        " Tokyo 4",
        "8",
    ]


CONTRACT = """
import januslens
from importlib.resources import files

print(januslens.__version__)
print(*sorted(path.name for path in files("januslens.v1").iterdir() if path.suffix == ".proto"))
"""


@pytest.mark.slow
def test_the_package_has_its_version_and_the_contract(scripts: Path) -> None:
    shown = ran(scripts / "python", "-c", CONTRACT)
    assert shown.stderr == ""
    release, protos = shown.stdout.splitlines()
    assert f'version = "{release}"' in (ROOT / "pyproject.toml").read_text()
    folder = ROOT / "protos" / "januslens" / "v1"
    assert protos.split() == sorted(path.name for path in folder.glob("*.proto"))


@pytest.mark.slow
def test_the_command_works_with_the_server(scripts: Path, server_address: str) -> None:
    command, server = scripts / "januslens", ("--server", server_address)
    models = ran(command, "models", *server)
    assert (models.returncode, models.stderr) == (0, "")
    assert "demo" in models.stdout
    trace = ran(command, "trace", PROMPT, *server)
    assert (trace.returncode, trace.stderr) == (0, "")
    assert "Tokyo" in trace.stdout
    gradient = ran(command, "gradient", PROMPT, "--target", " Paris", *server)
    assert (gradient.returncode, gradient.stderr) == (0, "")
    assert "Paris" in gradient.stdout


@pytest.mark.slow
def test_an_error_prints_one_message_and_a_nonzero_status(
    scripts: Path, server_address: str
) -> None:
    failed = ran(
        scripts / "januslens", "trace", PROMPT, "--model", "nobody", "--server", server_address
    )
    assert failed.returncode != 0
    assert failed.stdout == ""
    assert "unknown model 'nobody': expected one of demo" in failed.stderr
    assert "Traceback" not in failed.stderr
