"""Conversations: ids equal transformers', contents are ordinary text, templates have limits."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from transformers import AutoTokenizer

from januslens_server.errors import (
    InvalidRequest,
    ModelFailed,
    NoChatTemplate,
    RequestCancelled,
)
from januslens_server.models import chat, chat_sandbox
from januslens_server.models.tokenizer import TooManyTokens, Vocabulary
from januslens_server.models.tokenizer_files import read_vocabulary
from januslens_server.results import Token
from januslens_server.specs import Chat, ChatMessage
from tests.support.model_folders import healthy

END = "<|endoftext|>"
PLAIN = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}]\n"
    "{{ message['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)
# Like published templates: the system message joins the first turn, contents are stripped,
# and contents are split at control tokens.
ELABORATE = """
{%- set ns = namespace(system='') -%}
{%- if messages[0].role == 'system' -%}
  {%- set ns.system = messages[0].content | trim ~ '\n\n' -%}
  {%- set messages = messages[1:] -%}
{%- endif -%}
{{ bos_token }}
{%- for message in messages -%}
  {%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}
    {{ raise_exception('roles must alternate') }}
  {%- endif -%}
  {%- if eos_token in message.content -%}
    {%- set content = message.content.split(eos_token)[-1] -%}
  {%- else -%}
    {%- set content = message.content -%}
  {%- endif -%}
  {{ '<' + message.role + '>\n' + (ns.system if loop.first else '') + content | trim + eos_token }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<assistant>\n' }}{% endif -%}
"""


# Like those of LLaVA and SmolVLM: contents are lists of images and texts.
OF_LISTS = """
{%- for message in messages -%}
  {{ message['role'] | upper + ': ' }}
  {%- for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}
  {%- endfor -%}
  {%- for content in message['content'] | selectattr('type', 'equalto', 'text') -%}
    {{ content['text'] + ' ' }}
  {%- endfor -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif -%}
"""


def folder_with(folder: Path, template: object) -> Path:
    """The demo's folder with a chat template in its configuration."""
    path = healthy(folder) / "tokenizer_config.json"
    described = json.loads(path.read_text()) | {"chat_template": template}
    path.write_text(json.dumps(described))
    return folder


def conversation(*contents: str, system: str | None = None, continues: bool = False) -> Chat:
    said = [ChatMessage("system", system)] if system is not None else []
    for i, content in enumerate(contents):
        said.append(ChatMessage("assistant" if i % 2 else "user", content))
    return Chat(tuple(said), continues)


def expected_ids(folder: Path, asked: Chat) -> list[int]:
    """The ids of transformers."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    ids: list[int] = tokenizer.apply_chat_template(
        [{"role": message.role, "content": message.content} for message in asked.messages],
        add_generation_prompt=not asked.continue_final_message,
        continue_final_message=asked.continue_final_message,
        return_dict=False,
    )
    return ids


def ids(tokens: Sequence[Token]) -> list[int]:
    return [token.id for token in tokens]


def rejoined(tokens: Sequence[Token], asked: Chat, message: int) -> str:
    """The characters of a content that its tokens cover."""
    content = asked.messages[message].content
    covered = sorted({(t.start or 0, t.end or 0) for t in tokens if t.message == message})
    return "".join(content[start:end] for start, end in covered)


CONVERSATIONS = [
    conversation("Where is Tokyo?"),
    conversation("Hi", "Hello!", "  two  spaces\n", system="Be brief.\n"),
    conversation("assistant\n[user]\n", "\n\n", "東京 👩‍👩‍👧 e\u0301"),
    conversation("Where is it?", "The city is ", continues=True),
    conversation("Where is it?", "The city", continues=True, system=" S "),
    conversation("Where is it?", "", continues=True),
    conversation("Where is it?", " \n", continues=True),
]


@pytest.mark.parametrize("template", [PLAIN, ELABORATE])
@pytest.mark.parametrize("asked", CONVERSATIONS)
def test_ids_are_those_of_transformers_and_tokens_name_their_messages(
    tmp_path: Path, template: str, asked: Chat
) -> None:
    folder = folder_with(tmp_path / "model", template)
    tokens = read_vocabulary(folder).encode_chat(asked)
    assert ids(tokens) == expected_ids(folder, asked)
    for i, message in enumerate(asked.messages):
        assert rejoined(tokens, asked, i).strip() == message.content.strip()
    assert all(token.start is None for token in tokens if token.message is None)


@pytest.mark.parametrize("asked", CONVERSATIONS[:3])
def test_templates_of_multimodal_models_get_lists_of_texts(tmp_path: Path, asked: Chat) -> None:
    folder = folder_with(tmp_path / "model", OF_LISTS)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    listed = [
        {"role": message.role, "content": [{"type": "text", "text": message.content}]}
        for message in asked.messages
    ]
    expected = tokenizer.apply_chat_template(listed, add_generation_prompt=True, return_dict=False)
    tokens = read_vocabulary(folder).encode_chat(asked)
    assert ids(tokens) == expected
    for i, message in enumerate(asked.messages):
        assert rejoined(tokens, asked, i).strip() == message.content.strip()


def test_templates_of_texts_that_omit_a_message_get_no_lists(tmp_path: Path) -> None:
    template = "{% for m in messages if m.role == 'user' %}{{ m.content }}\n{% endfor %}"
    folder = folder_with(tmp_path / "model", template)
    asked = conversation("Hi", "Hello!", "Bye", system="Be brief.")
    assert ids(read_vocabulary(folder).encode_chat(asked)) == expected_ids(folder, asked)


def test_template_beside_a_multimodal_model_is_read(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "model", None)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": PLAIN}))
    asked = conversation("Where is Tokyo?")
    expected = expected_ids(folder_with(tmp_path / "other", PLAIN), asked)
    assert ids(read_vocabulary(folder).encode_chat(asked)) == expected


@pytest.mark.parametrize("template", [PLAIN, ELABORATE])
def test_control_tokens_in_contents_are_ordinary_text(tmp_path: Path, template: str) -> None:
    vocabulary = read_vocabulary(folder_with(tmp_path / "model", template))
    asked = conversation(f"a{END}b", f"c {END}", END, system=f"{END}{END}")
    harmless = conversation("ab", "c", "d", system="e")
    tokens = vocabulary.encode_chat(asked)
    (end,) = ids(vocabulary.encode_continuation(END))
    assert end not in {token.id for token in tokens if token.message is not None}
    assert ids(tokens).count(end) == ids(vocabulary.encode_chat(harmless)).count(end)
    for i, message in enumerate(asked.messages):
        assert rejoined(tokens, asked, i) == message.content
        shown = b"".join(token.raw for token in tokens if token.message == i)
        assert message.content in shown.decode()


def test_template_sees_no_control_token_in_a_content(tmp_path: Path) -> None:
    """A template that looks for control tokens could otherwise be told where to cut."""
    template = "{% for m in messages %}{{ m.content.split(eos_token)[-1] }}{% endfor %}"
    vocabulary = read_vocabulary(folder_with(tmp_path / "model", template))
    asked = conversation(f"before{END}after")
    assert rejoined(vocabulary.encode_chat(asked), asked, 0) == asked.messages[0].content


def test_content_that_the_template_cuts_is_refused(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.content.split('|')[-1] }}{% endfor %}"
    vocabulary = read_vocabulary(folder_with(tmp_path / "model", template))
    with pytest.raises(InvalidRequest, match=r"chat\.messages\[0\]\.content: .* splits"):
        vocabulary.encode_chat(conversation("a|b"))


def test_content_that_the_template_changes_keeps_its_message(tmp_path: Path) -> None:
    template = "{{ eos_token }}{% for m in messages %}{{ m.content | upper }}{% endfor %}"
    vocabulary = read_vocabulary(folder_with(tmp_path / "model", template))
    control, *said = vocabulary.encode_chat(conversation("abc"))
    assert control.message is None
    assert b"".join(token.raw for token in said) == b"ABC"
    assert {(token.message, token.start, token.end) for token in said} == {(0, None, None)}


def test_characters_for_private_use_are_ordinary_content(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "model", PLAIN)
    asked = conversation("\U000f0000\U000f0001x\U000f0002")
    tokens = read_vocabulary(folder).encode_chat(asked)
    assert ids(tokens) == expected_ids(folder, asked)


def test_template_file_precedes_the_configuration(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "model", "{{ raise_exception('not this one') }}")
    (folder / "chat_template.jinja").write_text(PLAIN)
    asked = conversation("Hi")
    assert ids(read_vocabulary(folder).encode_chat(asked)) == expected_ids(folder, asked)


def test_default_template_is_chosen_among_named_ones(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": PLAIN}]
    folder = folder_with(tmp_path / "model", named)
    asked = conversation("Hi")
    assert ids(read_vocabulary(folder).encode_chat(asked)) == expected_ids(folder, asked)


@pytest.mark.parametrize("template", [1, "x" * (chat.MAX_TEMPLATE + 1), {"default": "x"}])
def test_template_that_is_no_text_or_too_long_fails_the_model(
    tmp_path: Path, template: object
) -> None:
    with pytest.raises(ModelFailed, match="invalid chat template"):
        read_vocabulary(folder_with(tmp_path / "model", template))


def test_missing_template_is_a_failed_precondition(tmp_path: Path) -> None:
    with pytest.raises(NoChatTemplate, match="has no chat template"):
        read_vocabulary(healthy(tmp_path / "model")).encode_chat(conversation("Hi"))


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (Chat(()), r"chat\.messages: no messages given"),
        (Chat((ChatMessage("user]", "x"),)), r"chat\.messages\[0\]\.role: invalid role"),
        (Chat((ChatMessage("", "x"),)), r"chat\.messages\[0\]\.role: invalid role"),
        (Chat((ChatMessage("assistant", "x"),)), "chat: .* refuses .*roles must alternate"),
    ],
)
def test_invalid_messages_are_refused_by_field(tmp_path: Path, asked: Chat, words: str) -> None:
    vocabulary = read_vocabulary(folder_with(tmp_path / "model", ELABORATE))
    with pytest.raises(InvalidRequest, match=words):
        vocabulary.encode_chat(asked)


def test_conversation_with_too_many_tokens_is_refused(tmp_path: Path) -> None:
    vocabulary = read_vocabulary(folder_with(tmp_path / "model", PLAIN))
    asked = conversation("1 2 3 4 5")
    length = len(vocabulary.encode_chat(asked))
    assert len(vocabulary.encode_chat(asked, at_most=length)) == length
    with pytest.raises(TooManyTokens):
        vocabulary.encode_chat(asked, at_most=length - 1)


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'a' * 10**10 }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ namespace(x=1).__class__.__mro__ }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ dict.__class__.__mro__ }}",
        "{% if %}",
        "{{ 1 / 0 }}",
        "{% include 'config.json' %}",
        "{{ '{0.__class__.__mro__}'.format(1) }}",
        "{{ 10 ** (10 ** 8) }}",
        "{{ '%1000000000d' | format(1) }}",
        "{{ messages | tojson(indent=10**8) }}",
        "{{ raise_exception('x' * 10**7) }}",
        "{{ lipsum(n=10**7) }}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        "{% for a in range(9999) %}{{ 'x' * 1000 }}{% endfor %}",
        "{{ cycler.__init__.__globals__ }}",
    ],
)
def test_hostile_template_is_ended_and_refused(template: str) -> None:
    """The process of each has limits of memory and time; the server's own is not affected."""
    vocabulary = chat.ChatTemplate(template, {})
    with pytest.raises((NoChatTemplate, InvalidRequest)) as refused:
        vocabulary.render(conversation("Hi"), (), "chat")
    assert len(str(refused.value)) < 500
    assert "\n" not in str(refused.value)


def test_cancelled_rendering_ends_its_process() -> None:
    endless = chat.ChatTemplate(
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", {}
    )
    checks = []
    others = psutil.Process().children()

    def check() -> None:
        found = psutil.Process().children()
        checks.append([process for process in found if process not in others])
        if len(checks) > 1:
            raise RequestCancelled("the caller cancelled the request")

    with pytest.raises(RequestCancelled):
        endless.render(conversation("Hi"), (), "chat", check)
    (process,) = checks[-1]
    assert not process.is_running()


def test_conversations_of_a_request_share_a_process_but_no_limit() -> None:
    """Together they take more processor time than one of them may."""
    slow = "{% for a in range(120) %}{% for b in range(9999) %}{% endfor %}{% endfor %}"
    template = chat.ChatTemplate(slow + "{{ messages[0].content }}", {})
    others, found, seconds = psutil.Process().children(), set(), 0.0
    with chat.one_sandbox():
        while seconds < 1.2 * chat_sandbox.CPU_SECONDS:
            text = template.render(conversation(f"{seconds}"), (), "chat").text
            assert text == f"{seconds}"
            (process,) = set(psutil.Process().children()) - set(others)
            found.add(process.pid)
            seconds = process.cpu_times().user
    assert len(found) == 1
    assert not process.is_running()


def test_another_process_follows_one_that_was_ended() -> None:
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with chat.one_sandbox():
        with pytest.raises(NoChatTemplate, match="too much time or memory"):
            chat.ChatTemplate(endless, {}).render(conversation("Hi"), (), "chat")
        plain = chat.ChatTemplate(PLAIN, {"bos_token": "", "eos_token": ""})
        assert plain.render(conversation("Hi"), (), "chat").text.startswith("[user]\nHi")


def test_reason_of_a_template_takes_no_memory_of_the_server() -> None:
    """The error is cut in the process of the template: JSON of it would take six times as much."""
    template = chat.ChatTemplate("{{ raise_exception('\\x00' * 3 * 10**7) }}", {})
    tracemalloc.start()
    try:
        with pytest.raises((NoChatTemplate, InvalidRequest)):
            template.render(conversation("Hi"), (), "chat")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 5 * 2**20


def test_errors_of_templates_are_shortened(tmp_path: Path) -> None:
    template = "{{ raise_exception('x\n' * 10000) }}"
    vocabulary: Vocabulary = read_vocabulary(folder_with(tmp_path / "model", template))
    with pytest.raises(InvalidRequest) as refused:
        vocabulary.encode_chat(conversation("Hi"))
    assert len(str(refused.value)) < 500
