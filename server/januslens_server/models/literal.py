"""Tokenizing a continuation: the text's own spaces, no more and no fewer.

Many tokenizers put a space before a text, or strip those that it has, because they were made for
whole texts. A target continues a prompt: " Tokyo" and "Tokyo" must stay different.
"""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer

# Steps that add or take away a text's outer spaces.
ADDING = {"Prepend", "Strip"}
# Before Metaspace, which keeps spaces as pieces' marks, it would take away all of them.
SPLITTING = {"WhitespaceSplit"}


def literal_tokenizer(tokenizer: Tokenizer) -> Tokenizer:
    """The same tokenizer without such steps; itself if it has none."""
    described = json.loads(tokenizer.to_str())
    splitter = described["pre_tokenizer"]
    dropped = SPLITTING if "Metaspace" in json.dumps(splitter) else set()
    literal = described | {
        "normalizer": _without(described["normalizer"], ADDING, "normalizers"),
        "pre_tokenizer": _without(splitter, dropped, "pretokenizers"),
    }
    return tokenizer if literal == described else Tokenizer.from_str(json.dumps(literal))


def _without(step: dict[str, Any] | None, dropped: set[str], parts: str) -> dict[str, Any] | None:
    """A step, or a sequence of steps, as `tokenizer.json` describes it."""
    if step is None or step["type"] in dropped:
        return None
    if step["type"] == "Sequence":
        kept = [_without(part, dropped, parts) for part in step[parts]]
        return step | {parts: [part for part in kept if part is not None]}
    if step["type"] == "Metaspace":
        return step | {"prepend_scheme": "never"}
    if "add_prefix_space" in step:
        return step | {"add_prefix_space": False}
    return step
