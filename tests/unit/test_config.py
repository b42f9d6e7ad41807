"""Settings: where each comes from, and the one line that says what is wrong with one."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from januslens_server.config import ModelSetting, Settings, as_yaml, read_settings
from januslens_server.demo import model_path


@pytest.fixture(autouse=True)
def _no_settings_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    for field in fields(Settings):
        monkeypatch.delenv(f"JANUSLENS_{field.name.upper()}", raising=False)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "januslens.yaml"


def test_defaults_are_the_contracts() -> None:
    settings = read_settings([])
    assert (settings.host, settings.port) == ("127.0.0.1", 50051)
    assert (settings.metrics_host, settings.metrics_port) == ("127.0.0.1", 9464)
    assert settings.models == ()
    assert (settings.device, settings.data_type) == ("cpu", "auto")


def test_flag_before_environment_before_file_before_default(
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
    a, b = ModelSetting("a", "org/a", "main"), ModelSetting("b", "org/b", None)
    assert read_settings(["--model", "a=org/a@main", "--model", "b=org/b"]).models == (a, b)
    file.write_text("models: [a=org/a@main, b=org/b]\n")
    assert read_settings(["--config", str(file)]).models == (a, b)
    monkeypatch.setenv("JANUSLENS_MODELS", "b=org/b a=org/a@main")
    assert read_settings(["--config", str(file)]).models == (b, a)


def test_a_local_folder_is_read_as_a_shell_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "config.json").touch()
    (model,) = read_settings(["--model", "a=~/gpt2"]).models
    assert model.location == str(tmp_path / "gpt2")


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
    assert {line.split(":")[0] for line in as_yaml(read_settings([])).splitlines()} == {
        field.name for field in fields(Settings)
    }


def test_help_names_every_flag_and_ends_well(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        read_settings(["--help"])
    assert ended.value.code == 0
    helped = capsys.readouterr().out
    names = {field.name for field in fields(Settings)} - {"models"} | {"model"}
    assert all(f"--{name.replace('_', '-')}" in helped for name in names)


WRONG_FLAGS = {
    "unknown flag": (["--nope"], "No such option '--nope'"),
    "argument": (["demo"], "unexpected extra argument"),
    "no value": (["--port"], "requires an argument"),
    "no number": (["--port", "x"], "'--port': 'x'"),
    "port beyond": (["--port", "65536"], "65536 is not in the range"),
    "no queue": (["--max-waiting", "0"], "'--max-waiting': 0 is not in the range"),
    "negative grace": (["--grace-seconds", "-1"], "'--grace-seconds'"),
    "data type": (["--data-type", "int8"], "'int8' is not one of 'auto', 'float32'"),
    "no location": (["--model", "a"], "expected NAME=PATH_OR_HUB_ID[@REVISION], got 'a'"),
    "no name": (["--model", "=b"], "expected NAME=PATH_OR_HUB_ID[@REVISION], got '=b'"),
    "no folder": (["--model", "a=./absent"], "expected a model folder with config.json"),
    "no home": (["--model", "a=~/absent"], "got '~/absent'"),
    "no cache size": (["--cache-size", "some"], "expected SIZE such as 10GiB, got 'some'"),
    "no size": (["--max-memory", "cpu=lots"], "expected DEVICE=SIZE"),
    "name twice": (["--model", "a=x/y", "--model", "a=x/z"], "got a twice"),
    "no certificate": (["--tls-certificate", "absent.pem"], "'absent.pem' does not exist"),
    "no callers": (["--callers", "absent.yaml"], "'absent.yaml' does not exist"),
    "open": (["--host", "0.0.0.0"], "--tls-certificate and --callers or --tls-client-ca to serve"),  # noqa: S104 - refused
    "open, IPv6": (["--host", "[::]"], "to serve beyond loopback on [::]; --insecure serves"),
    "open by name": (["--host", "example.org"], "to serve beyond loopback on example.org"),
    "no file": (["--config", "absent.yaml"], "No such file or directory"),
}


@pytest.mark.parametrize("name", WRONG_FLAGS)
def test_a_wrong_flag_ends_with_one_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags, said = WRONG_FLAGS[name]
    assert said in complaint(flags, capsys)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "[::1]", "::1", "localhost"])
def test_loopback_needs_neither_tls_nor_callers(host: str) -> None:
    assert read_settings(["--host", host]).host == host


@pytest.fixture
def pem(tmp_path: Path) -> str:
    path = tmp_path / "some.pem"
    path.touch()
    return str(path)


def test_beyond_loopback_it_needs_both(pem: str, capsys: pytest.CaptureFixture[str]) -> None:
    tls = ["--tls-certificate", pem, "--tls-key", pem]
    public = ["--host", "0.0.0.0"]  # noqa: S104 - which is what this is about
    said = "expected --callers or --tls-client-ca to serve beyond"
    assert said in complaint([*public, *tls], capsys)
    said = "expected --tls-certificate to serve beyond"
    assert said in complaint([*public, "--callers", pem], capsys)
    for known in (["--callers", pem], ["--tls-client-ca", pem]):
        assert not read_settings([*public, *tls, *known]).insecure
    assert read_settings([*public, "--insecure"]).insecure


def test_half_a_tls_configuration_is_refused(pem: str, capsys: pytest.CaptureFixture[str]) -> None:
    for half in (["--tls-certificate", pem], ["--tls-key", pem]):
        assert "--tls-key together, got one of them" in complaint(half, capsys)
    assert "with --tls-client-ca, got none" in complaint(["--tls-client-ca", pem], capsys)


WRONG_FILES = {
    "no YAML": (b"port: [1", "expected ',' or ']'"),
    "tabs": (b"a:\n\t- b", "cannot start any token"),
    "no text": (b"\xff\xfe\x00", "can't decode byte"),
    "a list": (b"- a", "expected settings by name, got ['a']"),
    "a word": (b"demo", "expected settings by name, got 'demo'"),
    "unknown": (b"prot: 1", "got ['prot']"),
    "no names": (b"1: 2\nx: 3", "got [1, 'x']"),
    "no number": (b"port: abc", "'--port': 'abc'"),
    "no list": (b"models: 3", "'--model'"),
    "no models": (b"models: [{a: b}]", "expected NAME=PATH_OR_HUB_ID[@REVISION]"),
    "a flag": (b"print_config: true", "got ['print_config']"),
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
    assert "'soon' is not a valid float" in complaint([], capsys)


def complaint(flags: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The line with which the server ends."""
    with pytest.raises(SystemExit) as ended:
        read_settings(flags)
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert line.startswith("januslens-server: ")
    return line


def test_a_setting_without_a_value_keeps_its_default(file: Path) -> None:
    file.write_text("port:\nhost: localhost\n")
    settings = read_settings(["--config", str(file)])
    assert (settings.host, settings.port) == ("localhost", 50051)


def test_an_empty_file_changes_nothing(file: Path) -> None:
    file.write_text("# nothing yet\n")
    assert read_settings(["--config", str(file)]) == read_settings([])
