"""Corpus to training batches: documents packed into rows, rows placed at positions."""

from collections.abc import Iterable, Iterator
from itertools import islice

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from januslens_server.demo.tokenizer import END_OF_TEXT_ID

# Encoding many documents in one call is several times faster than one by one.
ENCODE_CHUNK = 1000


def packed_rows(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerFast, length: int
) -> Iterator[list[int]]:
    """Rows of exactly `length` token ids, each starting with a fresh document.

    Documents end with the end-of-text token; what exceeds the row is cut off. A row never starts
    with that token, as no prompt does.
    """
    row: list[int] = []
    for document in _encoded(texts, tokenizer):
        row += [*document, END_OF_TEXT_ID]
        if len(row) >= length:
            yield row[:length]
            row = []


def batches(rows: Iterable[list[int]], size: int) -> Iterator[Tensor]:
    """Token ids `[size, length]`."""
    stream = iter(rows)
    while chunk := list(islice(stream, size)):
        yield torch.tensor(chunk)


def shifted_positions(tokens: Tensor, n_positions: int, generator: torch.Generator) -> Tensor:
    """Position ids for `tokens` `[batch, length]`: thirds start at 0, anywhere, at the end.

    Rows are shorter than the model's context; without the shift its later positions would keep
    their random initial embeddings.
    """
    batch, length = tokens.shape
    starts = torch.randint(n_positions - length + 1, (batch, 1), generator=generator)
    starts[0::3] = 0
    starts[2::3] = n_positions - length
    return starts + torch.arange(length)


def _encoded(texts: Iterable[str], tokenizer: PreTrainedTokenizerFast) -> Iterator[list[int]]:
    stream = iter(texts)
    while chunk := list(islice(stream, ENCODE_CHUNK)):
        yield from tokenizer(chunk)["input_ids"]
