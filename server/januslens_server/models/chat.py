"""Render conversations with a tokenizer's chat template, and find the contents in the text."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from januslens_server.errors import CancelCheck, InvalidRequest, NoChatTemplate, never_cancelled
from januslens_server.models import chat_sandbox
from januslens_server.specs import Chat

# Roles are part of the template's text, so they must not be able to spell a control token.
ROLE = re.compile(r"[\w.-]{1,64}", re.ASCII)

# Maximum number of characters of a template. Published ones have up to 30,000.
MAX_TEMPLATE = 2**20

# Seconds after which a rendering is ended, and between two checks for cancellation. The first
# rendering of a process usually takes a tenth of a second.
SECONDS, CHECK_SECONDS = 5.0, 0.1
_TOO_MUCH = "it takes too much time or memory"

# Longest reason of a template that an error quotes, in characters.
MAX_REASON = 300

# Characters for private use, of which a rendering needs two per message and one more.
_PRIVATE = range(0xF0000, 0x10FFFE)


Transferred = TypeVar("Transferred")


class Content(NamedTuple):
    """Characters `start` to `end` of a rendered text that are content of `message`.

    `offset` is the index of the first one in the content; None if the template changed them.
    """

    start: int
    end: int
    message: int
    offset: int | None


@dataclass(frozen=True)
class Rendered:
    """A conversation as text; `contents` are in ascending order and do not overlap."""

    text: str
    contents: list[Content]


class ChatTemplate:
    """A chat template of a model folder. It is compiled and run in a process with limits."""

    def __init__(self, source: str | None, variables: Mapping[str, str]) -> None:
        """`variables` are the special tokens that templates name, such as `bos_token`."""
        self._source = source
        self._variables = dict(variables)

    def render(
        self,
        chat: Chat,
        control: Iterable[str],
        field: str,
        check_cancelled: CancelCheck = never_cancelled,
    ) -> Rendered:
        """Render a conversation. `check_cancelled` is called until the template has run.

        Every content is surrounded by private-use characters, so that it can be found in the
        rendered text. `control` holds the texts of control tokens. They are hidden from the
        template where a content spells them, because templates such as Qwen3's split contents at
        them.

        Raises:
            InvalidRequest: There are no messages, a role is invalid, or the template refuses them.
            NoChatTemplate: There is no template, or it is broken or exceeds the limits.
        """
        _check(chat, field)
        if self._source is None:
            raise NoChatTemplate(
                "the tokenizer has no chat template; send the conversation as a text with the "
                "model's own markup"
            )
        marks = _Marks(self._source, chat, control, field)
        text = self._text(marks, chat, field, check_cancelled)
        if chat.continue_final_message:
            text = marks.before_continuation(text, field)
        return marks.read(text, chat, field)

    def _text(self, marks: _Marks, chat: Chat, field: str, check_cancelled: CancelCheck) -> str:
        """Render the messages with their contents as texts, or as lists of one text.

        Templates of multimodal models read lists of texts and images, and some of them omit a
        content that is a text.
        """
        messages, continues = marks.messages(chat), chat.continue_final_message
        with one_sandbox():
            text = self._run(messages, continues, field, check_cancelled)
            if marks.kept(text) == sum(1 for message in messages if message["content"].strip()):
                return text
            listed = [
                message | {"content": [{"type": "text", "text": message["content"]}]}
                for message in messages
            ]
            try:
                other = self._run(listed, continues, field, check_cancelled)
            except (InvalidRequest, NoChatTemplate):  # it reads texts
                return text
        printed = "'type': 'text'" in other  # a list where the template expects a text
        return other if marks.kept(other) > marks.kept(text) and not printed else text

    def _run(
        self,
        messages: Sequence[Mapping[str, Any]],
        continues: bool,
        field: str,
        check_cancelled: CancelCheck,
    ) -> str:
        variables: dict[str, Any] = self._variables | {
            "messages": messages,
            "tools": None,
            "documents": None,
            "add_generation_prompt": not continues,
        }
        with one_sandbox() as sandbox:
            answer = sandbox.render(self._source, variables, check_cancelled)
        if reason := answer.get("unusable"):
            raise _unusable(reason)
        if "refused" in answer:
            reason = _shortened(answer["refused"])
            raise InvalidRequest(field, f"the chat template refuses these messages: {reason}")
        text: str = answer["text"]
        return text


class Sandbox:
    """A process that renders conversations one after another. It starts with the first one."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def render(
        self, template: str | None, variables: Mapping[str, Any], check_cancelled: CancelCheck
    ) -> dict[str, str]:
        """Return the answer of `chat_sandbox` to one conversation.

        `check_cancelled` is called until it is there. What it raises ends the process.

        Raises `NoChatTemplate` if the template exceeds a limit.
        """
        request = json.dumps({"template": template, "variables": variables}).encode() + b"\n"
        deadline = time.monotonic() + SECONDS

        def check() -> None:
            check_cancelled()
            if time.monotonic() > deadline:
                raise _unusable(_TOO_MUCH)

        try:
            if self._process is None:
                self._start()
            self._send(request, check)
            answer: dict[str, str] = json.loads(self._received(check))
        except BaseException:
            self.close()
            raise
        return answer

    def _start(self) -> None:
        self._socket, end = socket.socketpair()
        self._socket.settimeout(CHECK_SECONDS)
        with end:
            self._process = subprocess.Popen(  # noqa: S603 - this file of ours, a fixed command
                [sys.executable, "-I", Path(chat_sandbox.__file__)],
                stdin=end.fileno(),
                stdout=end.fileno(),
                stderr=subprocess.DEVNULL,
            )

    def _send(self, request: bytes, check: Callable[[], None]) -> None:
        left = memoryview(request)
        while left:
            left = left[self._attempted(partial(self._socket.send, left)) or 0 :]
            check()

    def _received(self, check: Callable[[], None]) -> bytes:
        answer = bytearray()
        while not answer.endswith(b"\n"):
            piece = self._attempted(partial(self._socket.recv, 2**16))
            if piece == b"":
                raise _unusable(_TOO_MUCH)
            answer += piece or b""
            check()
        return bytes(answer)

    def _attempted(self, transfer: Callable[[], Transferred]) -> Transferred | None:
        """Transfer data; None if the process is not ready. Raises `NoChatTemplate` if it ended."""
        try:
            return transfer()
        except TimeoutError:
            return None
        except ConnectionError as error:
            raise _unusable(_TOO_MUCH) from error

    def close(self) -> None:
        """End the process; the next conversation starts another one."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._socket.close()
            self._process = None


_SHARED: ContextVar[Sandbox | None] = ContextVar("shared_sandbox", default=None)


@contextmanager
def one_sandbox() -> Iterator[Sandbox]:
    """Yield a sandbox, which all conversations that are rendered in the block share.

    Starting a process takes a tenth of a second; a request has up to 64 conversations.
    """
    if (shared := _SHARED.get()) is not None:
        yield shared
        return
    sandbox = Sandbox()
    token = _SHARED.set(sandbox)
    try:
        yield sandbox
    finally:
        _SHARED.reset(token)
        sandbox.close()


def _unusable(reason: str) -> NoChatTemplate:
    return NoChatTemplate(f"the chat template of the model cannot be used: {_shortened(reason)}")


def _shortened(reason: str) -> str:
    line = " ".join(reason.split())
    return line if len(line) <= MAX_REASON else line[:MAX_REASON] + " ..."


def _check(chat: Chat, field: str) -> None:
    if not chat.messages:
        raise InvalidRequest(f"{field}.messages", "no messages given; send at least one")
    for i, message in enumerate(chat.messages):
        if not ROLE.fullmatch(message.role):
            raise InvalidRequest(
                f"{field}.messages[{i}].role",
                f"invalid role {message.role!r}; expected letters, digits, '_', '-' and '.'",
            )


class _Marks:
    """Characters that mark the beginning and the end of each content, and break control tokens.

    None of them occurs in the template or in a content. Spaces at both ends of a content stay
    outside, because templates strip them.
    """

    def __init__(self, source: str, chat: Chat, control: Iterable[str], field: str) -> None:
        used = set(source).union(*(message.content for message in chat.messages))
        unused = (chr(code) for code in _PRIVATE if chr(code) not in used)
        marks = list(islice(unused, 2 * len(chat.messages) + 1))
        if len(marks) < 2 * len(chat.messages) + 1:
            raise InvalidRequest(
                f"{field}.messages",
                "the messages use all private-use characters; remove some",
            )
        self._break, *self._ends = marks
        names = sorted({name for name in control if len(name) > 1}, key=len, reverse=True)
        anywhere = "|".join(map(re.escape, names))
        self._control = re.compile(f"(?=(?:{anywhere}))(.)", re.DOTALL) if names else None

    def messages(self, chat: Chat) -> list[dict[str, str]]:
        """The messages with marks."""
        last = len(chat.messages) - 1
        marked = []
        for i, message in enumerate(chat.messages):
            content = message.content
            if self._control is not None:
                content = self._control.sub(rf"\g<1>{self._break}", content)
            before, inside, after = _stripped(content)
            first, end = self._ends[2 * i : 2 * i + 2]
            if chat.continue_final_message and i == last:
                # As transformers: a space after the mark shows whether spaces are kept.
                content = f"{before}{first}{inside}{after}{end} "
            elif inside:
                content = f"{before}{first}{inside}{end}{after}"
            marked.append({"role": message.role, "content": content})
        return marked

    def kept(self, text: str) -> int:
        """The number of contents in a rendered text."""
        return sum(end in text for end in self._ends[1::2])

    def before_continuation(self, text: str, field: str) -> str:
        """The text up to the end of the last content, which the model continues."""
        end = self._ends[-1]
        if end not in text:
            raise InvalidRequest(
                f"{field}.continue_final_message",
                "the chat template omits the last message; send a message that it includes",
            )
        said, _, rest = text.rpartition(end)
        if not rest.startswith(" "):
            said, begin = said.rstrip(), self._ends[-2]
            if said.endswith(begin):  # an empty content: the spaces are before its mark
                said = said.removesuffix(begin).rstrip() + begin
        return said + end

    def read(self, text: str, chat: Chat, field: str) -> Rendered:
        """Remove the marks, and return where the contents are."""
        numbers = {mark: i for i, mark in enumerate(self._ends)}
        pieces = re.split(f"([{''.join(self._ends)}])", text.replace(self._break, ""))
        contents: list[Content] = []
        length = 0
        opened: tuple[int, int] | None = None  # the message, and where its content begins
        for piece in pieces:
            number = numbers.get(piece)
            if number is None:
                length += len(piece)
            elif opened is None and number % 2 == 0:
                opened = number // 2, length
            elif opened is not None and number == 2 * opened[0] + 1:
                contents.append(Content(opened[1], length, opened[0], None))
                opened = None
            else:
                raise _cut(field, number // 2)
        if opened is not None:
            raise _cut(field, opened[0])
        whole = "".join(piece for piece in pieces if piece not in numbers)
        return Rendered(whole, list(_placed(whole, contents, chat)))


def _cut(field: str, message: int) -> InvalidRequest:
    return InvalidRequest(
        f"{field}.messages[{message}].content",
        "the chat template splits this content; send the conversation as a text with the "
        "model's own markup",
    )


def _stripped(content: str) -> tuple[str, str, str]:
    """Spaces before a content, the content without them, and spaces after it."""
    rest = content.lstrip()
    inside = rest.rstrip()
    return content[: len(content) - len(rest)], inside, rest[len(inside) :]


def _placed(text: str, contents: Iterable[Content], chat: Chat) -> Iterator[Content]:
    """Add the spaces around each content that the template kept, and the index in the content."""
    behind = 0
    for start, end, message, _ in contents:
        before, inside, after = _stripped(chat.messages[message].content)
        offset = len(before) if text[start:end].rstrip() == inside else None
        if offset is not None:
            first = start - len(before)
            if first >= behind and text[first:start] == before:
                start, offset = first, 0  # noqa: PLW2901 - the same content, now whole
            if text[end : end + len(after)] == after:
                end += len(after)  # noqa: PLW2901 - as above
        behind = end
        yield Content(start, end, message, offset)
