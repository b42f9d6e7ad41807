"""Options that several commands share, and the handling of Ctrl-C."""

from __future__ import annotations

import functools
import json
import math
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from itertools import zip_longest
from pathlib import Path
from types import FrameType
from typing import IO, Any, Concatenate, Literal, ParamSpec

import click
from google.protobuf.message import Message

from januslens._connection import DEFAULT_ADDRESS
from januslens._presentation import waiting_line
from januslens.arguments import Chat, Prompt, Text
from januslens.cli.tables import console, cost_table, file_size
from januslens.client import Client
from januslens.errors import JanuslensError
from januslens.results.exports import json_line
from januslens.results.kinds import Lens, MatrixKind
from januslens.results.models import CostEstimate


@contextmanager
def interruptible(cancel: Callable[[], object]) -> Iterator[None]:
    """Let the first Ctrl-C call `cancel` and end the block with `KeyboardInterrupt`.

    Python raises `KeyboardInterrupt` in the main thread, but gRPC's compiled code may swallow it.
    So another thread also calls `cancel`: then the call fails, which ends the block.
    """
    interrupt = signal.getsignal(signal.SIGINT)
    if not callable(interrupt) or threading.current_thread() is not threading.main_thread():
        yield  # the embedding program handles the signal
        return
    interrupted = threading.Event()

    def on_interrupt(number: int, frame: FrameType | None) -> None:
        if not interrupted.is_set():
            interrupted.set()
            threading.Thread(target=cancel, name="interrupt", daemon=True).start()
        interrupt(number, frame)

    signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield
    except (JanuslensError, ValueError) as error:  # gRPC's ValueError: the channel is closed
        if interrupted.is_set():
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, interrupt)


COUNT = click.IntRange(min=0)
lens_option = click.option(
    "--lens",
    type=click.Choice([lens.lower() for lens in Lens if lens is not Lens.UNSPECIFIED]),
    default="final_norm",
    show_default=True,
    help="Normalization of vectors before they are projected to the vocabulary.",
)


class Number(click.types.FloatParamType):
    """A number of at least `minimum`; NaN is refused, and so is infinity unless `infinite`."""

    def __init__(self, minimum: float | None = None, *, infinite: bool = False) -> None:
        self._minimum = minimum
        self._infinite = infinite

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Return the value as a float."""
        number = float(super().convert(value, param, ctx))
        if math.isnan(number) or (math.isinf(number) and not self._infinite):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        if self._minimum is not None and number < self._minimum:
            self.fail(f"{value!r} is less than {self._minimum:g}.", param, ctx)
        return number


_RANGE = re.compile(r"(\d+)(?:-(\d+))?|(-\d+)")


_CHAT_OPTIONS = (
    click.option("--system", metavar="TEXT", help="System message of a conversation."),
    click.option(
        "--user",
        metavar="TEXT",
        multiple=True,
        help="User message of a conversation, instead of PROMPT (repeatable).",
    ),
    click.option(
        "--assistant",
        metavar="TEXT",
        multiple=True,
        help="Answer to the --user option with the same number (repeatable); the model continues "
        "the last one if no --user follows.",
    ),
    click.option(
        "--messages",
        type=click.File(encoding="utf-8"),
        metavar="FILE",
        help="Conversation as a JSON list of objects with role and content; - = standard input.",
    ),
)


def with_chat(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of a conversation to a command, which receives it as `chat`, or None."""

    @functools.wraps(command)
    def run(
        *args: Any,
        system: str | None,
        user: tuple[str, ...],
        assistant: tuple[str, ...],
        messages: IO[str] | None,
        **kwargs: Any,
    ) -> None:
        chat = _turns(system, user, assistant)
        if messages is not None:
            if chat is not None:
                raise click.UsageError(
                    "--messages is given with --system, --user or --assistant; give only one",
                    click.get_current_context(),
                )
            chat = _read_messages(messages)
        command(*args, chat=chat, **kwargs)

    decorated: Callable[..., None] = run
    for option in reversed(_CHAT_OPTIONS):
        decorated = option(decorated)
    return decorated


def _turns(system: str | None, user: Sequence[str], assistant: Sequence[str]) -> Chat | None:
    """Return the messages of user and assistant in alternating order."""
    if not (user or assistant):
        if system is not None:
            message = "--system is given without --user; give both"
            raise click.UsageError(message, click.get_current_context())
        return None
    if not len(user) - 1 <= len(assistant) <= len(user):
        raise click.UsageError(
            f"got {len(user)} --user and {len(assistant)} --assistant; expected them to alternate",
            click.get_current_context(),
        )
    messages = [] if system is None else [{"role": "system", "content": system}]
    for asked, answer in zip_longest(user, assistant):
        messages.append({"role": "user", "content": asked})
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
    return Chat(messages, continue_final_message=len(assistant) == len(user))


def _read_messages(file: IO[str]) -> Chat:
    """Read a conversation; a file that does not hold a JSON list is a usage error."""
    try:
        messages = json.load(file)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        message = f"{file.name} is not valid JSON: {error}"
        raise click.UsageError(message, click.get_current_context()) from error
    if not isinstance(messages, list):
        message = f"{file.name} is not a list of messages; expected objects with role and content"
        raise click.UsageError(message, click.get_current_context())
    return Chat(messages)


def given(text: str | None, chat: Chat | None, name: str) -> None:
    """Require a text or a conversation, and not both.

    Raises:
        click.UsageError: Both or none were given.
    """
    if text is None and chat is None:
        message = f"Missing argument '{name}'; give it, or a conversation with --user"
        raise click.UsageError(message, click.get_current_context())
    if text is not None and chat is not None:
        message = f"{name} and a conversation are both given; give only one of them"
        raise click.UsageError(message, click.get_current_context())


def prompt_argument(command: Callable[..., None]) -> Callable[..., None]:
    """Add the argument PROMPT, the options for tokenizing it, and those of a conversation."""

    @functools.wraps(command)
    def run(
        *args: Any,
        prompt: str | None,
        chat: Chat | None,
        no_special_tokens: bool,
        literal: bool,
        **kwargs: Any,
    ) -> None:
        given(prompt, chat, "PROMPT")
        if chat is not None and (no_special_tokens or literal):
            message = "--no-special-tokens and --literal do not apply to conversations"
            raise click.UsageError(message, click.get_current_context())
        text = Text(prompt or "", not no_special_tokens, literal)
        command(*args, prompt=chat or text, **kwargs)

    decorated = with_chat(run)
    for option in (
        click.option(
            "--literal", is_flag=True, help="Read control tokens in PROMPT as ordinary text."
        ),
        click.option(
            "--no-special-tokens",
            is_flag=True,
            help="Do not add special tokens such as BOS to PROMPT.",
        ),
        click.argument("prompt", required=False),
    ):
        decorated = option(decorated)
    return decorated


def layer_list(_ctx: click.Context, _param: click.Parameter, value: str | None) -> list[int] | None:
    """Parse numbers and ranges, both ends included: `0-3,7,-1` is [0, 1, 2, 3, 7, -1]."""
    if value is None:
        return None
    layers: list[int] = []
    for piece in value.split(","):
        match = _RANGE.fullmatch(piece.strip())
        first, last = (0, -1) if match is None else (match[1] or match[3], match[2])
        first, last = int(first), int(last or first)
        if last < first:
            raise click.BadParameter(f"{value!r} is not a list of layers such as 0-3,7 or -1.")
        layers += range(first, last + 1)
    return layers


def position_list(
    _ctx: click.Context, _param: click.Parameter, value: str | None
) -> list[int] | Literal["all"] | None:
    """Parse positions: `-1,3` is [-1, 3]; `all` is returned unchanged."""
    if value is None or value == "all":
        return value  # type: ignore[return-value]  # mypy does not narrow by equality
    try:
        return [int(piece) for piece in value.split(",")]
    except ValueError:
        message = f"{value!r} is neither a list of positions such as -1,3 nor 'all'."
        raise click.BadParameter(message) from None


def matrix_list(
    _ctx: click.Context, _param: click.Parameter, value: str | None
) -> list[MatrixKind] | None:
    """Parse kinds of matrices, such as `ff1,ff2`."""
    if value is None:
        return None
    try:
        return [MatrixKind.of(piece.strip()) for piece in value.split(",")]
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def module_list(_ctx: click.Context, _param: click.Parameter, value: str | None) -> list[str]:
    """Parse names of modules, such as `linear_attn.out_proj,mamba.*`."""
    return [piece.strip() for piece in (value or "").split(",") if piece.strip()]


_UNIT = re.compile(r"(\d+)\.(\d+)")
_SOURCE = re.compile(r"(\d+)\.(\d+)\.(-?\d+)")


def unit_list(
    _ctx: click.Context, _param: click.Parameter, value: str | None
) -> list[tuple[int, int]]:
    """Parse heads or neurons as layer.number: `9.6,9.9` is [(9, 6), (9, 9)]."""
    matches = [_UNIT.fullmatch(piece.strip()) for piece in value.split(",")] if value else []
    if not all(matches):
        raise click.BadParameter(f"{value!r} is not a list of layer.number such as 9.6,9.9.")
    return [(int(match[1]), int(match[2])) for match in matches if match]


def source_list(
    _ctx: click.Context, _param: click.Parameter, value: str | None
) -> list[tuple[int, int, int]]:
    """Parse sources of heads as layer.head.position: `9.6.2,9.6.3` is [(9, 6, 2), (9, 6, 3)]."""
    matches = [_SOURCE.fullmatch(piece.strip()) for piece in value.split(",")] if value else []
    if not all(matches):
        raise click.BadParameter(f"{value!r} is not a list of layer.head.position such as 9.6.2.")
    return [(int(match[1]), int(match[2]), int(match[3])) for match in matches if match]


def number_list(_ctx: click.Context, _param: click.Parameter, value: str | None) -> list[float]:
    """Parse numbers: `0.01,0.1` is [0.01, 0.1]; nothing is an empty list."""
    try:
        return [float(piece) for piece in value.split(",")] if value else []
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of numbers such as 0.01,0.1.") from None


P = ParamSpec("P")

_FILE = click.Path(exists=True, dir_okay=False)

# Options with the same name and value as an argument of the client.
_CONNECTION = ("token", "secure", "root_certificates", "resume", "timeout")
# The client's arguments by name.
Connection = dict[str, Any]

_CONNECTION_OPTIONS = (
    click.option(
        "--server",
        metavar="ADDR",
        default=DEFAULT_ADDRESS,
        envvar="JANUSLENS_SERVER",
        show_default=True,
        show_envvar=True,
        help="Address of the server, as host:port.",
    ),
    click.option(
        "--token",
        envvar="JANUSLENS_TOKEN",
        show_envvar=True,
        help="Bearer token, if the server requires one.",
    ),
    click.option("--secure", is_flag=True, help="Use TLS with the system's root certificates."),
    click.option(
        "--root-certificates",
        type=_FILE,
        envvar="JANUSLENS_ROOT_CERTIFICATES",
        show_envvar=True,
        help="Use TLS with the root certificates in this PEM file.",
    ),
    click.option(
        "--client-certificate", type=_FILE, help="Client certificate (PEM) for mutual TLS."
    ),
    click.option("--client-key", type=_FILE, help="Private key (PEM) of the client certificate."),
    click.option(
        "--resume", is_flag=True, help="Continue an interrupted stream on another replica."
    ),
    click.option(
        "--timeout",
        type=Number(0.001, infinite=True),
        help="Maximum seconds per call; default: no limit.",
    ),
)

_json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print the responses as JSON Lines (protobuf JSON)."
)

rows_option = click.option(
    "--rows",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="Maximum rows per table in the terminal; does not apply to --html.",
)

model_option = click.option(
    "--model", default="", metavar="NAME", help="Model name; default: the only model that serves."
)


def with_connection(command: Callable[..., None]) -> Callable[..., None]:
    """Add the connection options to a command, which receives them as arguments of a client."""

    @functools.wraps(command)
    def run(
        server: str,
        client_certificate: str | None,
        client_key: str | None,
        **others: Any,
    ) -> None:
        connection = {name: others.pop(name) for name in _CONNECTION}
        connection["address"] = server
        connection["client_certificate"] = _pair(client_certificate, client_key)
        command(connection, **others)

    decorated: Callable[..., None] = run
    for option in reversed(_CONNECTION_OPTIONS):
        decorated = option(decorated)
    return decorated


class WaitingLine:
    """What a command waits for, on standard error.

    A terminal has one line that changes and disappears; elsewhere only the first text is written.
    """

    def __init__(self) -> None:
        self._shown = ""

    def show(self, text: str) -> None:
        """Show this text instead of the one before."""
        if sys.stderr.isatty():
            click.echo("\r" + text.ljust(len(self._shown)), nl=False, err=True)
        elif not self._shown:
            click.echo(text, err=True)
        self._shown = text

    def close(self) -> None:
        """Clear the line of a terminal, because the wait has ended."""
        if self._shown and sys.stderr.isatty():
            click.echo("\r" + " " * len(self._shown) + "\r", nl=False, err=True)
        self._shown = ""


def with_client(command: Callable[Concatenate[Client, bool, P], None]) -> Callable[..., None]:
    """Add the connection options and --json to a command, which receives a connected client.

    The command also receives whether --json is set. If so, the client prints every response, and
    the command prints nothing.
    """

    @functools.wraps(command)
    def run(connection: Connection, as_json: bool, *args: P.args, **kwargs: P.kwargs) -> None:
        line = WaitingLine()

        def received(message: Message) -> None:
            line.close()
            if as_json:
                click.echo(json_line(message))

        with usage_errors():
            opened = Client(
                **connection,
                on_response=received,
                on_waiting=lambda place: line.show(waiting_line(place)),
            )
        with opened as client, interruptible(client.close), closing(line):
            command(client, as_json, *args, **kwargs)

    return with_connection(_json_option(run))


def _pair(certificate: str | None, key: str | None) -> tuple[str, str] | None:
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        missing = "--client-key" if key is None else "--client-certificate"
        message = f"{missing} is missing; --client-certificate and --client-key belong together"
        raise click.UsageError(message, click.get_current_context())
    return certificate, key


@contextmanager
def usage_errors() -> Iterator[None]:
    """Report a TypeError or ValueError of the client's arguments as a usage error."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise click.UsageError(str(error), click.get_current_context()) from error


def _in_existing_folder(
    _context: click.Context, _option: click.Parameter, path: Path | None
) -> Path | None:
    """Refuse a file without a folder before the result is computed."""
    if path is not None and not path.parent.is_dir():
        raise click.BadParameter(f"the folder {str(path.parent)!r} does not exist")
    return path


def file_option(name: str, shown: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return an option for a file to write, whose folder must exist."""
    return click.option(
        name,
        type=click.Path(dir_okay=False, writable=True, path_type=Path),
        callback=_in_existing_folder,
        metavar="FILE",
        help=shown,
    )


page_option = file_option("--html", "Also write the result as a self-contained HTML page.")
out_option = file_option(
    "--out", "Also save the result to this file, which `januslens open` shows."
)
export_option = file_option(
    "--export",
    "Also write the flow graph to this file: .graphml, .gexf, or .json for node-link JSON.",
)


def write_page(path: Path, page: str) -> None:
    """Write a page, and print its path and size to standard error.

    Raises:
        click.FileError: The file cannot be written.
    """
    _write(path, lambda: path.write_text(page, encoding="utf-8"))


def save_result(path: Path | None, save: Callable[[Path], object]) -> None:
    """Save a result if a file is given, and print its path and size to standard error.

    Raises:
        click.FileError: The file cannot be written.
    """
    if path is not None:
        _write(path, lambda: save(path))


def _write(path: Path, write: Callable[[], object]) -> None:
    try:
        write()
    except OSError as error:
        raise click.FileError(str(path), error.strerror) from error
    click.echo(f"wrote {path} ({file_size(path.stat().st_size)})", err=True)


def not_both(as_json: bool, page: Path | None) -> None:
    """Refuse --json together with --html, which needs further requests.

    Raises:
        click.UsageError: Both were given.
    """
    if as_json and page:
        message = "--json and --html are both given; give only one of them"
        raise click.UsageError(message, click.get_current_context())


estimate_option = click.option(
    "--estimate", is_flag=True, help="Print the estimated cost without running the request."
)


def show_estimate(
    ask: Callable[..., CostEstimate], as_json: bool, prompt: Prompt, asked: Mapping[str, Any]
) -> None:
    """Request an estimate with the options in `asked`, and print it."""
    with usage_errors():
        cost = ask(prompt, **asked)
    if not as_json:
        console().print(cost_table(cost))
