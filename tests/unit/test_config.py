"""Settings: precedence of sources, types, and one readable line per error."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

from januslens_server.config import (
    ModelLocation,
    ServerSettings,
    as_yaml,
    read_settings,
    unknown_variable_warnings,
)
from januslens_server.config import settings as settings_module
from januslens_server.demo import model_path


@pytest.fixture(autouse=True)
def _no_settings_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ServerSettings.model_fields:
        monkeypatch.delenv(f"JANUSLENS_{name.upper()}", raising=False)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "januslens.yaml"


@pytest.mark.parametrize("host", ["[::]", "::"])
def test_all_addresses_are_those_of_ipv4_on_a_machine_without_ipv6(
    host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--host", host, "--metrics-host", host, "--insecure"]
    for available, bound in ((True, host), (False, "0.0.0.0")):  # noqa: S104 - of a container
        monkeypatch.setattr(settings_module, "has_ipv6", lambda found=available: found)
        settings = read_settings(arguments)
        assert (settings.host, settings.metrics_host) == (bound, bound)


def test_defaults() -> None:
    settings = read_settings([])
    assert (settings.host, settings.port) == ("127.0.0.1", 50051)
    assert (settings.metrics_host, settings.metrics_port) == ("127.0.0.1", 9464)
    assert settings.models == ()
    assert (settings.device, settings.data_type) == ("cpu", "auto")


def test_flags_override_variables_which_override_the_file(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text("port: 1\nhost: file\nmetrics_host: file\n")
    monkeypatch.setenv("JANUSLENS_PORT", "2")
    monkeypatch.setenv("JANUSLENS_HOST", "127.0.0.2")
    settings = read_settings(["--config", str(file), "--port", "3"])
    assert settings.port == 3
    assert settings.host == "127.0.0.2"
    assert settings.metrics_host == "file"
    assert settings.metrics_port == 9464


def test_the_file_can_be_named_by_the_environment(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text("port: 1\n")
    monkeypatch.setenv("JANUSLENS_CONFIG", str(file))
    assert read_settings([]).port == 1


def test_models_from_flags_environment_and_file(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = ModelLocation("a", "org/a", "main"), ModelLocation("b", "org/b", None)
    assert read_settings(["--model", "a=org/a@main", "--model", "b=org/b"]).models == (a, b)
    file.write_text("models: [a=org/a@main, b=org/b]\n")
    assert read_settings(["--config", str(file)]).models == (a, b)
    monkeypatch.setenv("JANUSLENS_MODELS", "b=org/b a=org/a@main")
    assert read_settings(["--config", str(file)]).models == (b, a)


ODD = [
    "--host=0.0.0.0",
    "--insecure",
    "--health-port=8081",
    "--port=0",
    f"--model=a={model_path()}",
    "--model=b=org/b@v1.0",
    "--data-type=bfloat16",
    "--max-memory=cpu=1.5GiB",
    "--cache-dir=/var/cache/januslens",
    "--cache-size=2GiB",
    "--index-neurons",
    "--row-cache=1.5GiB",
    "--threads=2",
    "--chunk-bytes=1MiB",
    "--max-waiting=3",
    "--stall-seconds=0.5",
    "--grace-seconds=0",
    "--log-level=debug",
]


def test_print_config_prints_what_config_reads(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        read_settings([*ODD, "--print-config"])
    assert ended.value.code == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    file.write_text(printed.out)
    again = read_settings(["--config", str(file)])
    assert again == read_settings(ODD) != read_settings([])
    assert as_yaml(again) == printed.out


def test_every_setting_can_be_printed_and_read() -> None:
    assert set(yaml.safe_load(as_yaml(read_settings([])))) == set(ServerSettings.model_fields)


def test_help_lists_every_flag_and_exits_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        read_settings(["--help"])
    assert ended.value.code == 0
    helped = capsys.readouterr().out
    names = set(ServerSettings.model_fields) - {"models"} | {"model"}
    assert all(f"--{name.replace('_', '-')}" in helped for name in names)


WRONG_FLAGS = {
    "unknown flag": (["--nope"], "No such option '--nope'"),
    "argument": (["demo"], "unexpected extra argument"),
    "no value": (["--port"], "requires an argument"),
    "not a number": (["--port", "x"], "invalid --port 'x': expected a whole number"),
    "half a port": (["--port", "1.5"], "invalid --port '1.5': expected a whole number"),
    "port too large": (["--port", "65536"], "invalid --port '65536': expected at most 65535"),
    "no queue": (["--max-waiting", "0"], "invalid --max-waiting '0': expected at least 1"),
    "no time": (["--max-request-seconds", "0"], "expected a number above 0"),
    "negative grace": (["--grace-seconds", "-1"], "invalid --grace-seconds '-1'"),
    "data type": (
        ["--data-type", "int8"],
        "invalid --data-type 'int8': expected 'auto', 'float32'",
    ),
    "device": (["--device", "cpuu"], "invalid --device 'cpuu': expected cpu, cuda, cuda:N or auto"),
    "device number": (["--device", "cuda:x"], "invalid --device 'cuda:x'"),
    "device of a limit": (
        ["--max-memory", "gpu=1GiB"],
        "expected DEVICE=SIZE such as cuda:0=60GiB",
    ),
    "no location": (["--model", "a"], "'a': expected NAME=PATH_OR_HUB_ID[@REVISION]"),
    "no name": (["--model", "=b"], "'=b': expected NAME=PATH_OR_HUB_ID[@REVISION]"),
    "no cache size": (["--cache-size", "some"], "'some': expected a size such as 10GiB"),
    "no size": (["--max-memory", "cpu=lots"], "'cpu=lots': expected DEVICE=SIZE"),
    "name twice": (["--model", "a=x/y", "--model", "a=x/z"], "model name 'a' is used twice"),
    "no certificate": (["--tls-certificate", "no.pem"], "'no.pem': expected an existing file"),
    "no callers": (["--callers", "absent.yaml"], "'absent.yaml': expected an existing file"),
    "open": (
        ["--host", "0.0.0.0"],  # noqa: S104 - refused
        "'0.0.0.0' requires --tls-certificate and --tls-key, and --callers or --tls-client-ca",
    ),
    "open, IPv6": (["--host", "[::]"], "serving beyond loopback on '[::]' requires --tls"),
    "open by name": (
        ["--host", "example.org"],
        "serving beyond loopback on 'example.org' requires",
    ),
    "no file": (["--config", "absent.yaml"], "No such file or directory"),
}


@pytest.mark.parametrize("name", WRONG_FLAGS)
def test_a_wrong_flag_ends_with_one_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags, said = WRONG_FLAGS[name]
    assert said in complaint(flags, capsys)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "[::1]", "::1", "localhost"])
def test_loopback_requires_neither_tls_nor_callers(host: str) -> None:
    assert read_settings(["--host", host]).host == host


@pytest.fixture
def pem(tmp_path: Path) -> str:
    path = tmp_path / "some.pem"
    path.touch()
    return str(path)


def test_serving_beyond_loopback_requires_tls_and_authentication(
    pem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tls = ["--tls-certificate", pem, "--tls-key", pem]
    public = ["--host", "0.0.0.0"]  # noqa: S104 - which is what this is about
    said = "requires --callers or --tls-client-ca; to serve without them, pass --insecure"
    assert said in complaint([*public, *tls], capsys)
    said = "requires --tls-certificate and --tls-key; to serve without them, pass --insecure"
    assert said in complaint([*public, "--callers", pem], capsys)
    for known in (["--callers", pem], ["--tls-client-ca", pem]):
        assert not read_settings([*public, *tls, *known]).insecure
    assert read_settings([*public, "--insecure"]).insecure


def test_models_may_be_loadable_beyond_loopback_only_with_callers(
    pem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loadable = ["--loadable", str(tmp_path), "--loadable", "org/*"]
    assert read_settings(loadable).loadable == (str(tmp_path), "org/*")
    public = ["--host", "0.0.0.0", "--insecure", *loadable]  # noqa: S104 - which is what this is about
    assert "--loadable requires --callers" in complaint(public, capsys)
    assert read_settings([*public, "--callers", pem]).loadable
    for wrong in ("/no/such/folder", "name", "../x/y/z", "org/../x"):
        assert "invalid --loadable" in complaint(["--loadable", wrong], capsys)


def test_an_incomplete_tls_configuration_is_refused(
    pem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for half in (["--tls-certificate", pem], ["--tls-key", pem]):
        assert "--tls-certificate and --tls-key must be given together" in complaint(half, capsys)
    assert "--tls-client-ca requires --tls-certificate and --tls-key" in complaint(
        ["--tls-client-ca", pem], capsys
    )


WRONG_FILES = {
    "not YAML": (b"port: [1", "line 1, column 9: invalid YAML: expected ',' or ']'"),
    "tabs": (b"a:\n\t- b", "cannot start any token"),
    "not text": (b"\xff\xfe\x00", "can't decode byte"),
    "a list": (b"- a", "invalid content ['a']; expected settings by name"),
    "a word": (b"demo", "invalid content 'demo'; expected settings by name"),
    "unknown": (b"prot: 1", "unknown setting 'prot'; did you mean 'port'?"),
    "no names": (b"1: 2\nx: 3", "unknown setting 1"),
    "no number": (b"port: abc", "invalid port in"),
    "no list": (b"models: 3", "3: expected a list"),
    "no models": (b"models: [{a: b}]", "expected NAME=PATH_OR_HUB_ID[@REVISION]"),
    "a flag": (b"print_config: true", "unknown setting 'print_config'"),
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_a_wrong_file_ends_with_one_line(
    name: str, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, said = WRONG_FILES[name]
    file.write_bytes(content)
    assert said in complaint(["--config", str(file)], capsys)


def test_a_wrong_variable_ends_with_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("JANUSLENS_STALL_SECONDS", "soon")
    said = "invalid JANUSLENS_STALL_SECONDS 'soon': expected a number"
    assert said in complaint([], capsys)


def test_every_error_has_its_own_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read_settings(["--port", "x", "--threads", "0"])
    first, second = capsys.readouterr().err.splitlines()
    assert "invalid --port 'x'" in first
    assert "invalid --threads '0'" in second


def test_an_unknown_variable_is_reported_with_the_nearest_known_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert list(unknown_variable_warnings()) == []
    for name in ("JANUSLENS_TOKEN", "JANUSLENS_SERVER", "JANUSLENS_CONFIG", "JANUSLENS_PORT"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("JANUSLENS_MAX_WAITNG", "a-secret")
    (warning,) = unknown_variable_warnings()
    assert warning == (
        "unknown environment variable 'JANUSLENS_MAX_WAITNG' is ignored; "
        "did you mean 'JANUSLENS_MAX_WAITING'?"
    )


def test_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        read_settings(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"januslens-server {version('januslens')}\n"


def complaint(flags: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return the line with which the server exits."""
    with pytest.raises(SystemExit) as ended:
        read_settings(flags)
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert line.startswith("januslens-server: ")
    return line


def test_a_null_setting_keeps_its_default(file: Path) -> None:
    file.write_text("port:\nhost: localhost\n")
    settings = read_settings(["--config", str(file)])
    assert (settings.host, settings.port) == ("localhost", 50051)


def test_an_empty_file_changes_nothing(file: Path) -> None:
    file.write_text("# nothing yet\n")
    assert read_settings(["--config", str(file)]) == read_settings([])
