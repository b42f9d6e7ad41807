"""The synchronous and the asynchronous client have the same methods and documentation."""

from __future__ import annotations

import inspect
import pydoc
import re
import subprocess
import sys
from pathlib import Path

import pytest

import januslens
from januslens import AsyncClient, Client

VERBS = [
    "list_models",
    "model",
    "server_info",
    "load_model",
    "unload_model",
    "tokenize",
    "project",
    "preview_edit",
    "preview_edits",
    "survey",
    "find_neurons",
    "trace",
    "stream_trace",
    "trace_overview",
    "gradient_lens",
    "stream_gradient_lens",
    "estimate_trace",
    "estimate_gradient_lens",
    "activations",
    "stream_activations",
    "estimate_activations",
    "intervene",
    "stream_intervene",
    "estimate_intervene",
    "generate",
    "explain",
    "stream_generate",
    "estimate_generate",
]


def test_both_clients_have_the_same_methods() -> None:
    def public(client: type) -> set[str]:
        return {name for name in dir(client) if not name.startswith("_")}

    assert public(Client) == public(AsyncClient) == {*VERBS, "close"}


@pytest.mark.parametrize("verb", VERBS)
def test_both_clients_take_the_same_arguments(verb: str) -> None:
    sync, aio = getattr(Client, verb), getattr(AsyncClient, verb)
    assert inspect.signature(sync).parameters == inspect.signature(aio).parameters
    assert sync.__doc__ == aio.__doc__
    assert sync.__doc__
    assert sync.__name__ == aio.__name__ == verb
    streams = verb.startswith("stream_")
    assert inspect.iscoroutinefunction(aio) is not streams


@pytest.mark.parametrize("verb", [verb for verb in VERBS if not verb.startswith("stream_")])
def test_return_types_of_both_clients_correspond(verb: str) -> None:
    sync, aio = getattr(Client, verb), getattr(AsyncClient, verb)
    returned = inspect.signature(sync).return_annotation
    assert returned == str(inspect.signature(aio).return_annotation).removeprefix("Async")
    assert returned is not inspect.Signature.empty


def test_generated_modules_are_up_to_date() -> None:
    script = Path(__file__).parents[2] / "client" / "generate.py"
    done = subprocess.run(
        [sys.executable, str(script), "--check"], check=False, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("client", [Client, AsyncClient])
def test_help_shows_no_private_path(client: type) -> None:
    assert not re.search(r"januslens\._|\b_[a-z]+\.py", pydoc.render_doc(client))


@pytest.mark.parametrize("verb", VERBS)
def test_every_method_is_defined_in_the_clients_source(verb: str) -> None:
    source = inspect.getsource(getattr(Client, verb))
    assert source.lstrip().startswith(f"def {verb}(")


@pytest.mark.parametrize("call", ["trace", "gradient_lens", "intervene", "generate"])
def test_streams_and_estimates_document_the_arguments_of_the_whole_call(call: str) -> None:
    def arguments(verb: str) -> str:
        documented = inspect.getdoc(getattr(Client, verb)) or ""
        return documented.partition("Args:")[2].partition("    timeout:")[0]

    assert arguments(f"stream_{call}") == arguments(f"estimate_{call}") == arguments(call) != ""


def test_the_constructors_take_the_same_arguments() -> None:
    assert inspect.signature(Client) == inspect.signature(AsyncClient)


def test_a_method_on_an_instance_shows_no_self() -> None:
    with Client("127.0.0.1:1") as client:
        assert next(iter(inspect.signature(client.trace).parameters)) == "prompt"


@pytest.mark.parametrize("verb", VERBS)
def test_every_argument_is_documented(verb: str) -> None:
    documented = inspect.getdoc(getattr(Client, verb)) or ""
    for name in inspect.signature(getattr(Client, verb)).parameters:
        assert name == "self" or f"    {name}: " in documented


def test_an_async_client_that_was_never_used_closes() -> None:
    import asyncio

    asyncio.run(AsyncClient("127.0.0.1:1").close())


def test_repr_hides_the_token() -> None:
    with Client("127.0.0.1:1", token="sesame") as client:  # noqa: S106 - of no one
        assert "sesame" not in repr(client._connection)


def test_dunder_all_lists_every_public_name() -> None:
    assert sorted(januslens.__all__) == januslens.__all__
    assert all(hasattr(januslens, name) for name in januslens.__all__)


@pytest.mark.parametrize("module", ["januslens", "januslens.cli.program"])
def test_the_client_needs_neither_torch_nor_the_server(module: str) -> None:
    program = f"""
import sys

class Forbidding:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {{"torch", "transformers", "januslens_server"}}:
            raise AssertionError(f"{{name}} was imported")

sys.meta_path.insert(0, Forbidding())
import {module}
late = {{"pandas", "networkx", "safetensors"}} & set(sys.modules)
assert not late, f"{{late}} were imported before they were needed"
"""
    done = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("missing", "statement", "advice"),
    [
        (
            "pandas",
            "layer.nodes",
            "a frame of nodes needs pandas: pip install 'januslens[analysis]'",
        ),
        ("networkx", "layer.to_networkx()", "pip install 'januslens[analysis]'"),
        ("rich", "from januslens.cli import main; main()", "pip install 'januslens[cli]'"),
    ],
)
def test_a_missing_extra_is_named(missing: str, statement: str, advice: str) -> None:
    program = f"""
import sys
sys.modules[{missing!r}] = None
import januslens
layer = januslens.LayerGraph(layer=0, node_list=(), edge_list=(), known_nodes={{}})
{statement}
"""
    done = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert advice in done.stderr
