"""The prompts of a survey: lines of JSON, and the requests that are made of them.

A survey copies its prompts to a file of its own, so that it can be resumed without the original.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from google.protobuf.json_format import MessageToDict, Parse, ParseError
from google.protobuf.message import Message

from januslens._requests import (
    activations_request,
    generate_request,
    gradient_lens_request,
    intervene_request,
    preview_edits_request,
    trace_request,
)
from januslens.arguments import (
    Chat,
    Probe,
    Prompt,
    SubjectLike,
    TargetLike,
    input_message,
    probe_message,
    subject_message,
    target_message,
)
from januslens.v1 import (
    activations_pb2,
    common_pb2,
    edits_pb2,
    generation_pb2,
    gradient_lens_pb2,
    intervene_pb2,
    trace_pb2,
)

SurveyPrompts = str | Path | Iterable[Prompt | Mapping[str, Any]]
_Label = str | int | float | bool

_KEYS = (
    "prompt",
    "messages",
    "continue_final_message",
    "target",
    "other",
    "subject",
    "probes",
    "id",
    "labels",
)


@dataclass(frozen=True)
class SurveyPrompt:
    """One prompt of a survey.

    Attributes:
        number: Number of the prompt in the input, from 0.
        prompt: Text or token ids; None for a conversation.
        messages: Messages of a conversation, otherwise None.
        continue_final_message: The model continues the last message.
        target: The target of the prompt, if it has one.
        other: The second token of a logit difference, if it has one.
        subject: The subject of the prompt, as text or positions, if it has one.
        probes: Other prompts to read before and after an edit.
        id: A name of the caller.
        labels: Further values of the caller, which become columns.
    """

    number: int
    prompt: str | list[int] | None = None
    messages: list[dict[str, str]] | None = None
    continue_final_message: bool = False
    target: TargetLike | None = None
    other: TargetLike | None = None
    subject: SubjectLike | None = None
    probes: tuple[Probe, ...] = ()
    id: str | None = None
    labels: Mapping[str, str | int | float | bool] = field(default_factory=dict)

    @classmethod
    def from_line(cls, number: int, line: str) -> SurveyPrompt:
        """Read one line of JSON.

        Raises:
            ValueError: The line is not a prompt; the message has the line's number, from 1.
        """
        try:
            return cls._from_value(number, json.loads(line, parse_constant=_refused))
        except (TypeError, ValueError) as error:
            raise ValueError(f"line {number + 1}: {error}") from error

    @classmethod
    def _from_value(cls, number: int, value: Any) -> SurveyPrompt:
        given: Any = {"prompt": value} if isinstance(value, (str, list)) else value
        if not isinstance(given, Mapping):
            raise TypeError(f"invalid prompt {value!r}; expected a text or an object")
        unknown = [key for key in given if key not in _KEYS]
        if unknown:
            raise ValueError(
                f"unknown key {unknown[0]!r}; expected {', '.join(_KEYS)}; put other values "
                'into "labels"'
            )
        read: dict[str, Any] = dict(given)
        read["labels"] = _labels(given.get("labels") or {})
        read["probes"] = tuple(_probe(probe) for probe in given.get("probes") or ())
        if isinstance(given.get("subject"), list):
            read["subject"] = tuple(given["subject"])
        if not isinstance(read.get("id", ""), str | None):
            raise TypeError(f"invalid id {read['id']!r}; expected a text")
        found = cls(number, **read)
        found.input()
        for name in ("target", "other"):
            if (target := getattr(found, name)) is not None:
                target_message(target, name)
        if found.subject is not None:
            subject_message(found.subject)
        for probe in found.probes:
            probe_message(probe)
        return found

    def input(self) -> common_pb2.Input:
        """Return the prompt as a message.

        Raises:
            TypeError: It has an invalid type.
            ValueError: There is no prompt, or a text and messages.
        """
        if self.messages is None:
            return input_message(self.prompt)
        return input_message(self.prompt, Chat(self.messages, self.continue_final_message))

    def row(self) -> dict[str, Any]:
        """Return the columns of the table `prompts`; token ids become JSON."""
        columns = {
            "id": self.id,
            "text": _shown(self.prompt),
            "messages": self.messages,
            "target": _shown(self.target),
            "other": _shown(self.other),
            "subject": _shown(self.subject),
        }
        return columns | {f"label_{name}": label for name, label in self.labels.items()}


def _refused(constant: str) -> Any:
    """Refuse NaN and infinity, which JSON does not have."""
    raise ValueError(f"invalid number {constant}; expected a finite number")


def _labels(labels: Any) -> dict[str, _Label]:
    if not isinstance(labels, Mapping):
        raise TypeError(f"invalid labels {labels!r}; expected an object")
    for name, label in labels.items():
        if not isinstance(label, _Label):
            raise TypeError(f"invalid label {name}={label!r}; expected text, number or boolean")
        if isinstance(label, float) and not math.isfinite(label):
            raise ValueError(f"invalid label {name}={label}; expected a finite number")
    return dict(labels)


def _probe(given: Any) -> Probe:
    """Read a probe: a text, token ids, or an object with `prompt`, `target` and `label`."""
    if not isinstance(given, Mapping):
        return Probe(given)
    unknown = [key for key in given if key not in ("prompt", "target", "label")]
    if unknown or "prompt" not in given:
        raise ValueError(f"invalid probe {given!r}; expected the keys prompt, target and label")
    return Probe(given["prompt"], given.get("target"), given.get("label") or "")


def _shown(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value)


def _line(prompt: Prompt | Mapping[str, Any]) -> str:
    """Return a prompt of a Python program as a line of JSON."""
    value: Any = prompt
    if isinstance(prompt, Chat):
        value = {
            "messages": [dict(message) for message in prompt.messages],
            "continue_final_message": prompt.continue_final_message,
        }
    elif isinstance(prompt, Mapping):
        probes = [asdict(p) if isinstance(p, Probe) else p for p in prompt.get("probes") or ()]
        value = {**prompt, "probes": probes} if probes else prompt
    elif not isinstance(prompt, str):
        value = {"prompt": prompt if isinstance(prompt, list) else list(prompt)}  # type: ignore[arg-type]  # refused by from_line
    return json.dumps(value, ensure_ascii=False)


@dataclass(frozen=True)
class Input:
    """The prompts of a survey in a file.

    Attributes:
        path: The file, with a prompt in each line.
        count: Number of prompts.
        sha256: Hash of the file.
        labels: Type of each label: `string`, `double` or `bool`.
    """

    path: Path
    count: int
    sha256: str
    labels: Mapping[str, str]

    def prompts(self, done: bytearray) -> Iterator[SurveyPrompt]:
        """Yield the prompts whose number is not marked in `done`."""
        with self.path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines):
                if not done[number]:
                    yield SurveyPrompt.from_line(number, line)


def copy_prompts(prompts: SurveyPrompts, path: Path, request: SurveyRequest) -> Input:
    """Check the prompts, and write them to a file; lines that are empty are left out.

    Raises:
        TypeError: A prompt has an invalid type.
        ValueError: A prompt is invalid, or there are none.
        OSError: A file cannot be read or written.
    """
    digest, count = hashlib.sha256(), 0
    labels: dict[str, str] = {}
    with path.open("wb") as file:
        for line in _lines(prompts):
            prompt = SurveyPrompt.from_line(count, line)
            request.check(prompt)
            for name, label in prompt.labels.items():
                kind = _kind(label)
                labels[name] = kind if labels.get(name, kind) == kind else "string"
            encoded = f"{line}\n".encode()
            digest.update(encoded)
            file.write(encoded)
            count += 1
        file.flush()
        os.fsync(file.fileno())
    if not count:
        raise ValueError("there are no prompts; give at least one")
    return Input(path, count, digest.hexdigest(), dict(sorted(labels.items())))


def _lines(prompts: SurveyPrompts) -> Iterator[str]:
    if isinstance(prompts, (str, Path)):
        with Path(prompts).open(encoding="utf-8") as file:
            yield from (line.strip() for line in file if line.strip())
    else:
        yield from map(_line, prompts)


def _kind(label: _Label) -> str:
    if isinstance(label, bool):
        return "bool"
    return "string" if isinstance(label, str) else "double"


MESSAGES: Mapping[str, type[Message]] = {
    "trace": trace_pb2.TraceRequest,
    "gradient_lens": gradient_lens_pb2.GradientLensRequest,
    "intervene": intervene_pb2.InterveneRequest,
    "activations": activations_pb2.ActivationsRequest,
    "generate": generation_pb2.GenerateRequest,
    "preview_edits": edits_pb2.PreviewEditRequest,
}
BUILDERS: Mapping[str, Callable[..., Message]] = {
    "trace": trace_request,
    "gradient_lens": gradient_lens_request,
    "intervene": intervene_request,
    "activations": activations_request,
    "generate": generate_request,
    "preview_edits": preview_edits_request,
}


# The field of each request that needs a target, unless the call has one for all prompts.
_TARGETS = {"gradient_lens": "nll", "preview_edits": "target"}


@dataclass(frozen=True)
class SurveyRequest:
    """The request of every prompt of a survey.

    Attributes:
        rpc: Name of the client's method, such as `trace`.
        template: The request without a prompt.
    """

    rpc: str
    template: Any

    @classmethod
    def of(cls, rpc: str, options: Mapping[str, Any]) -> SurveyRequest:
        """Build the request from the arguments of the client's method.

        Raises:
            TypeError: The method has no such argument, or it has an invalid type.
            ValueError: There is no such method, or an argument has an invalid value.
        """
        if rpc not in BUILDERS:
            raise ValueError(f"unknown rpc {rpc!r}; expected one of {', '.join(BUILDERS)}")
        own_targets = rpc in _TARGETS and not {"target", "loss"} & set(options)
        placeholder = {"target": 0} if own_targets else {}
        template: Any = BUILDERS[rpc]("prompt", **placeholder, **options)
        template.ClearField("input")
        if own_targets:
            template.ClearField(_TARGETS[rpc])
        return cls(rpc, template)

    @classmethod
    def from_json(cls, rpc: str, text: str) -> SurveyRequest:
        """Read the fields of the request from protobuf JSON.

        Raises:
            ValueError: There is no such method, or the text is not a request of it.
        """
        if rpc not in MESSAGES:
            raise ValueError(f"unknown rpc {rpc!r}; expected one of {', '.join(MESSAGES)}")
        try:
            template = Parse(text, MESSAGES[rpc]())
        except ParseError as error:
            raise ValueError(f"invalid request: {error}") from error
        if template.HasField("input"):
            raise ValueError("the request has an input; expected the prompts in their own file")
        return cls(rpc, template)

    def to_json(self) -> dict[str, Any]:
        """Return the fields of the request as protobuf JSON."""
        return MessageToDict(self.template, preserving_proto_field_name=True)

    def check(self, prompt: SurveyPrompt) -> None:
        """Check that the prompt has what the call needs.

        Raises:
            ValueError: A gradient has neither a target nor a loss, or an edit has no target.
        """
        if self._needs_targets and prompt.target is None:
            rest = ", or a loss for all" if self.rpc == "gradient_lens" else ""
            raise ValueError(f"line {prompt.number + 1}: the prompt has no target; give one{rest}")

    @property
    def _needs_targets(self) -> bool:
        if self.rpc == "gradient_lens":
            return self.template.WhichOneof("loss") is None
        return self.rpc == "preview_edits" and not self.template.HasField("target")

    def message(self, prompt: SurveyPrompt, model: str, revision: str) -> Any:
        """Return the request of one prompt to a model of a known revision."""
        request = type(self.template)()
        request.CopyFrom(self.template)
        request.input.CopyFrom(prompt.input())
        request.model, request.revision = model, revision
        if self.rpc == "preview_edits":
            if prompt.target is not None:
                request.target.CopyFrom(target_message(prompt.target))
            request.probes.extend(probe_message(probe) for probe in prompt.probes)
        elif self.rpc in ("trace", "intervene"):
            for name in ("target", "other"):
                if (target := getattr(prompt, name)) is not None:
                    getattr(request, name).CopyFrom(target_message(target, name))
        elif self.rpc == "gradient_lens":
            if prompt.target is not None and not self.template.WhichOneof("loss"):
                request.nll.target.CopyFrom(target_message(prompt.target))
            if prompt.subject is not None:
                request.subject.CopyFrom(subject_message(prompt.subject))
        return request
