"""The published GGUF files, read by the server and by transformers, which wrote the folders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from januslens_server.models.loader import ModelSource, load
from tests.real.checkpoints import FOLDER, GEMMA, SMOLLM, parts

pytestmark = pytest.mark.real

TEXTS = [
    "The Eiffel Tower is located in the city of",
    "  two  spaces\n\n\tand 12,345.67 digits in 2023",
    "Grüße aus München 👋🏽, היום, 漢字, العربية",
    "def add(a, b):\n    return a + b  # 'tis we're",
]


@pytest.mark.parametrize(
    ("pattern", "folder", "quantization"),
    [
        ("**/SmolLM2-135M-Instruct.Q4_1.gguf", SMOLLM, "GGUF Q4_1, Q8_0"),
        (None, GEMMA, "GGUF Q4_K, Q5_0, Q6_K, Q8_0"),
    ],
    ids=["smollm2", "gemma3"],
)
def test_weights_and_tokens_equal_those_of_transformers(
    pattern: str | None, folder: Path, quantization: str
) -> None:
    file = FOLDER / "gemma3.gguf" if pattern is None else parts(pattern)[0]
    read, converted = (load(ModelSource("real", str(path))) for path in (file, folder))
    expected = converted.network.state_dict()
    found = read.network.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], values) for name, values in expected.items())
    assert read.provenance.quantization == quantization
    assert read.end_ids == converted.end_ids
    own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in TEXTS:
        assert [token.id for token in read.vocabulary.encode_prompt(text)] == own.encode(text).ids
