"""A tokenizer as the service needs it: literal ids, texts that show every byte, spans."""

from __future__ import annotations

from functools import lru_cache

from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerFast

from januslens_server.models.literal import literal_tokenizer
from januslens_server.models.pieces import Pieces
from januslens_server.results import Token

# Entries that are kept: 64 k of some 200 bytes.
ENTRIES = 2**16


class Vocabulary:
    """Reads and writes one model's tokens. From call to call it keeps entries that it has read."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """Wrap a fast tokenizer; slow ones cannot give character spans."""
        self._prompts: Tokenizer = tokenizer.backend_tokenizer
        self._prompts.no_truncation()  # folders keep what their training used
        self._prompts.no_padding()
        self._literal = literal_tokenizer(self._prompts)
        self._pieces = Pieces(self._prompts)
        # Every stream names hundreds of them, most of them again and again.
        self.token = lru_cache(ENTRIES)(self._entry)

    def encode(self, text: str, with_special_tokens: bool) -> list[Token]:
        """The tokens of `text` with the characters each came from.

        As a prompt's, with the special tokens that the tokenizer puts before a text; those behind
        it are left out, since a prompt goes on. Without special tokens the text is a literal
        continuation: its spaces are its own, the tokenizer adds none and takes none away.
        """
        if not with_special_tokens:
            return self._tokens(self._literal.encode(text, add_special_tokens=False))
        encoded = self._prompts.encode(text, add_special_tokens=True)
        tokens = self._tokens(encoded)
        return tokens[: len(tokens) - _added_behind(encoded)]

    def _entry(self, token_id: int) -> Token:
        """One vocabulary entry, without a place in a text."""
        return self._token(token_id, None, None)

    def _tokens(self, encoded: Encoding) -> list[Token]:
        return [
            self._token(token_id, start, end)
            for token_id, (start, end) in zip(encoded.ids, encoded.offsets, strict=True)
        ]

    def _token(self, token_id: int, start: int | None, end: int | None) -> Token:
        raw = self._pieces.raw(token_id)
        return Token(token_id, raw.decode("utf-8", errors="replace"), raw, start, end)


def _added_behind(encoded: Encoding) -> int:
    """How many tokens the tokenizer has put behind the text; none if there is nothing else."""
    mask: list[int] = encoded.special_tokens_mask
    return next((i for i, added in enumerate(reversed(mask)) if not added), 0)
