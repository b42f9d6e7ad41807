"""The bytes that a vocabulary entry stands for in running text."""

from __future__ import annotations

import json
import re
from typing import Any

from tokenizers import Tokenizer

# One byte of a character that has no token of its own (SentencePiece's byte fallback).
BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")

# What stands before a piece when it is decoded alone: decoders treat a text's start differently.
BEFORE = "x"


class Pieces:
    """Reads one tokenizer's pieces. A piece may be part of a character and so no text by itself."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        decoder: dict[str, Any] = json.loads(tokenizer.to_str())["decoder"] or {}
        added = tokenizer.get_added_tokens_decoder()
        self._tokenizer = tokenizer
        self._is_byte_level = "ByteLevel" in json.dumps(decoder)
        self._suffix = decoder.get("suffix", "") if decoder.get("type") == "BPEDecoder" else ""
        self._verbatim = {i for i, t in added.items() if t.special or self._is_byte_level}

    def raw(self, token_id: int) -> bytes:
        """The bytes of one token; empty for ids beyond the tokenizer's own, in a padded head."""
        piece = self._tokenizer.id_to_token(token_id)
        if piece is None:
            return b""
        if token_id in self._verbatim:
            return piece.encode()
        if self._is_byte_level:
            return b"".join(_BYTES.get(char, char.encode()) for char in piece)
        if byte := BYTE.fullmatch(piece):
            return bytes.fromhex(byte.group(1))
        return self._in_text(piece).encode()

    def _in_text(self, piece: str) -> str:
        """The piece as the tokenizer's decoder writes it inside a text, with its space if any."""
        if self._suffix and piece.endswith(self._suffix):  # marks a word's end, which takes a space
            return piece.removesuffix(self._suffix) + " "
        decoder = self._tokenizer.decoder
        text: str = piece if decoder is None else decoder.decode([BEFORE, piece])
        if text.startswith(BEFORE) and decoder is not None:
            return text.removeprefix(BEFORE)
        return piece.replace("\u2581", " ")


def _byte_alphabet() -> dict[str, bytes]:
    """Byte-level BPE's alphabet: printable Latin-1 stands for itself, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    other = [byte for byte in range(0x100) if byte not in printable]
    alphabet = {chr(byte): bytes([byte]) for byte in printable}
    return alphabet | {chr(0x100 + i): bytes([byte]) for i, byte in enumerate(other)}


_BYTES = _byte_alphabet()
