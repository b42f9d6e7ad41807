"""A tokenizer as the service needs it: literal ids, texts that show every byte, spans."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerFast

from januslens_server.results import Token


class Vocabulary:
    """Reads and writes one model's tokens. Holds no state between calls."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """Wrap a fast tokenizer; slow ones cannot give character spans."""
        self._tokenizer = tokenizer

    def encode(self, text: str, with_special_tokens: bool) -> list[Token]:
        """The tokens of `text` with the characters each came from."""
        encoded = self._tokenizer(
            text, add_special_tokens=with_special_tokens, return_offsets_mapping=True
        )
        spans: Sequence[tuple[int, int]] = encoded["offset_mapping"]
        return [
            self._token(token_id, start, end)
            for token_id, (start, end) in zip(encoded["input_ids"], spans, strict=True)
        ]

    def token(self, token_id: int) -> Token:
        """One vocabulary entry, without a place in a text."""
        return self._token(token_id, None, None)

    def _token(self, token_id: int, start: int | None, end: int | None) -> Token:
        raw = self._raw(token_id)
        return Token(token_id, raw.decode("utf-8", errors="replace"), raw, start, end)

    def _raw(self, token_id: int) -> bytes:
        """The token's bytes: a token may be part of a character and so no text by itself."""
        piece = self._tokenizer.convert_ids_to_tokens(token_id)
        if not isinstance(piece, str):  # ids beyond the tokenizer's own, in a padded head
            return b""
        if token_id in self._added:
            return piece.encode()
        if self._is_byte_level:
            return bytes(byte for char in piece for byte in _BYTES.get(char, char.encode()))
        if piece.startswith("<0x") and piece.endswith(">"):
            return bytes.fromhex(piece[3:-1])
        return piece.replace("\u2581", " ").encode()

    @cached_property
    def _added(self) -> frozenset[int]:
        return frozenset(self._tokenizer.added_tokens_decoder)

    @cached_property
    def _is_byte_level(self) -> bool:
        described: dict[str, Any] = json.loads(self._tokenizer.backend_tokenizer.to_str())
        return "ByteLevel" in json.dumps(described["decoder"])


def _byte_alphabet() -> dict[str, bytes]:
    """Byte-level BPE's alphabet: printable Latin-1 stands for itself, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    other = [byte for byte in range(0x100) if byte not in printable]
    alphabet = {chr(byte): bytes([byte]) for byte in printable}
    return alphabet | {chr(0x100 + i): bytes([byte]) for i, byte in enumerate(other)}


_BYTES = _byte_alphabet()
