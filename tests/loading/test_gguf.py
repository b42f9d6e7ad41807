"""GGUF files give the model, the numbers and the tokens that were written to them, or an error."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel

from januslens_server.errors import ModelFailed
from januslens_server.models.gguf_file import read_header
from januslens_server.models.gguf_tokenizer import read_gguf_vocabulary
from januslens_server.models.loader import ModelSource, load
from januslens_server.models.resident import ResidentModel
from tests.architectures.cases import SIZES, VOCABULARY, Case
from tests.architectures.tiny_models import plain

WIDE = {"intermediate_size": 64}  # Q8_0 stores blocks of 32 values
HEADS = {"head_dim": 12, "num_key_value_heads": 2}
GEMMA = HEADS | {"query_pre_attn_scalar": 12, "sliding_window": 4, "tie_word_embeddings": True}
CASES = {
    "gpt2": Case("gpt2", "gguf", {"n_inner": 64, "tie_word_embeddings": True}),
    "llama": Case("llama", "gguf", WIDE | {"num_key_value_heads": 2, "rope_theta": 500.0}),
    "qwen2": Case("qwen2", "gguf", WIDE | {"num_key_value_heads": 2}),
    "qwen3": Case("qwen3", "gguf", WIDE | HEADS),
    "gemma2": Case("gemma2", "gguf", WIDE | GEMMA | {"final_logit_softcapping": 3.0}),
    "gemma3": Case("gemma3_text", "gguf", WIDE | GEMMA | {"layer_types": None}),
}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
MERGES = ["1 2", "12 3", "123 4", "a b", "ab c", "Ġ a"]
ADDED = ["<bos>", "<eos>"]
BYTES = sorted(ByteLevel.alphabet(), key=lambda symbol: (symbol != "Ġ", symbol))
TOKENS = [*ADDED, *BYTES][: VOCABULARY - len(MERGES)]
BYTE_LEVEL: dict[str, Any] = {
    "model": "gpt2",
    "pre": "gpt-2",
    "tokens": [*TOKENS, *(merge.replace(" ", "") for merge in MERGES)],
    "token_type": [CONTROL, CONTROL, *[NORMAL] * (VOCABULARY - 2)],
    "merges": MERGES,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def settings_of(family: str, case: Case) -> dict[str, Any]:
    """The metadata that a conversion writes for this configuration."""
    config: Any = case.config()
    found = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
        "feed_forward_length": 64,
    }
    if family == "gpt2":
        return found | {"attention.layer_norm_epsilon": config.layer_norm_epsilon}
    rotary = config.rope_parameters
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    found |= {
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.key_length": width,
        "attention.value_length": width,
        "rope.freq_base": float(rotary.get("full_attention", rotary)["rope_theta"]),
    }
    if family.startswith("gemma"):
        found["attention.sliding_window"] = config.sliding_window
    if family == "gemma2":
        found["attn_logit_softcapping"] = config.attn_logit_softcapping
        found["final_logit_softcapping"] = config.final_logit_softcapping
    return found


def tensors_of(family: str, case: Case) -> dict[str, np.ndarray]:
    """The tensors as conversions to GGUF write them, by their names there."""
    network = plain(case)
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family)
    names = gguf.get_tensor_name_map(kind, network.config.num_hidden_layers)
    written = {}
    for parameter, values in network.state_dict().items():
        if parameter == "lm_head.weight" and network.config.tie_word_embeddings:
            continue
        stem, _, suffix = parameter.rpartition(".")
        array = values.numpy()
        name = f"{names.get_name(stem)}.{suffix}"
        if family == "llama" and ("attn_q." in name or "attn_k." in name):
            config = network.config
            heads = config.num_attention_heads
            heads = heads if "attn_q." in name else config.num_key_value_heads
            halves = array.reshape(heads, 2, len(array) // heads // 2, -1)
            array = halves.swapaxes(1, 2).reshape(array.shape)
        maps = ("attn_qkv.w", "attn_output.w", "ffn_up.w", "ffn_down.w")
        if family == "gpt2" and any(part in name for part in maps):
            array = array.T
        if family.startswith("gemma") and name.endswith("norm.weight"):
            array = array + 1
        written[name] = np.ascontiguousarray(array)
    return written


def write(
    path: Path,
    family: str = "llama",
    *,
    settings: dict[str, Any] | None = None,
    tokenizer: dict[str, Any] | None = None,
    further: dict[str, np.ndarray] | None = None,
    quantized: str | None = None,
) -> Path:
    """Write a tiny model with gguf's own writer; `quantized` is the type of its matrices."""
    case = CASES[family]
    writer = gguf.GGUFWriter(path, family)
    for key, value in (settings_of(family, case) | (settings or {})).items():
        add(writer, f"{family}.{key}", value)
    for key, value in (BYTE_LEVEL | (tokenizer or {})).items():
        add(writer, f"tokenizer.ggml.{key}", value)
    for name, array in (tensors_of(family, case) | (further or {})).items():
        if quantized is None or array.ndim < 2 or array.shape[-1] % 32:
            writer.add_tensor(name, array)
        else:
            kind = gguf.GGMLQuantizationType[quantized]
            writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def loaded(path: Path) -> ResidentModel:
    return load(ModelSource("tiny", str(path)))


def refusal(path: Path) -> str:
    with pytest.raises(ModelFailed) as failed:
        loaded(path)
    assert "\n" not in str(failed.value)
    return str(failed.value)


@pytest.mark.parametrize("family", CASES)
def test_weights_and_logits_equal_those_of_the_written_model(family: str, tmp_path: Path) -> None:
    model = loaded(write(tmp_path / "tiny.gguf", family))
    expected = plain(CASES[family])
    for name, values in expected.state_dict().items():
        torch.testing.assert_close(model.network.state_dict()[name], values, rtol=0, atol=3e-7)
    prompt = torch.tensor([CASES[family].prompt])
    found, logits = model.network(prompt).logits, expected(prompt).logits
    torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-4)
    assert model.provenance.quantization == ""
    assert model.end_ids == {1}


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "F16", "BF16"])
def test_quantized_weights_are_those_that_gguf_dequantizes(kind: str, tmp_path: Path) -> None:
    model = loaded(write(tmp_path / "tiny.gguf", quantized=kind))
    stored = gguf.quantize(
        plain(CASES["llama"]).state_dict()["model.layers.1.mlp.up_proj.weight"].numpy(),
        gguf.GGMLQuantizationType[kind],
    )
    expected = gguf.dequantize(stored, gguf.GGMLQuantizationType[kind])
    found = model.network.state_dict()["model.layers.1.mlp.up_proj.weight"].numpy()
    np.testing.assert_array_equal(found, expected)
    assert model.provenance.quantization == (f"GGUF {kind}" if kind[0] == "Q" else "")


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("gpt-2", ["1234", "Ġ", "ab", "abc"]),
        ("smollm", ["1", "2", "3", "4", "Ġ", "ab", "abc"]),
        ("llama-bpe", ["123", "4", "Ġ", "ab", "abc"]),
        ("qwen2", ["1", "2", "3", "4", "Ġ", "ab", "abc"]),
    ],
)
def test_texts_are_split_as_the_named_tokenizer_splits_them(
    split: str, expected: list[str], tmp_path: Path
) -> None:
    path = write(tmp_path / "tiny.gguf", tokenizer={"pre": split})
    vocabulary = read_gguf_vocabulary(read_header(path))
    ids = [token.id for token in vocabulary.encode_prompt("1234 ab<eos>abc")]
    tokens = BYTE_LEVEL["tokens"]
    assert [tokens[i] for i in ids] == [*expected[:-1], "<eos>", expected[-1]]


def test_sentence_piece_merges_the_pair_with_the_highest_score(tmp_path: Path) -> None:
    drawn = random.Random(0)
    letters = ["▁", *"abcd"]
    pieces = {"".join(drawn.choices(letters, k=drawn.randint(2, 4))) for _ in range(60)}
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(32)), *letters]
    tokens += sorted(pieces)[: VOCABULARY - len(tokens)]
    kinds = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 32]
    kinds += [NORMAL] * (len(tokens) - len(kinds))
    scores = {text: -drawn.random() for text in tokens}
    described = {
        "model": "llama",
        "pre": "default",
        "tokens": tokens,
        "token_type": kinds,
        "scores": [scores[text] for text in tokens],
        "unknown_token_id": 0,
        "bos_token_id": 1,
    }
    vocabulary = read_gguf_vocabulary(
        read_header(write(tmp_path / "tiny.gguf", tokenizer=described))
    )
    # As stored, because two scores may differ only in float64.
    rounded = {text: float(np.float32(score)) for text, score in scores.items()}
    for _ in range(200):
        text = "".join(drawn.choices([" ", *"abcd"], k=12))
        ids = [token.id for token in vocabulary.encode_prompt(text)]
        assert [tokens[i] for i in ids] == ["<s>", *merged("▁" + text.replace(" ", "▁"), rounded)]


def merged(text: str, scores: dict[str, float]) -> list[str]:
    """SentencePiece's algorithm, step by step."""
    parts = list(text)
    while True:
        unions = [a + b for a, b in pairwise(parts)]
        best = max((scores[union] for union in unions if union in scores), default=None)
        if best is None:
            return parts
        i = next(i for i, union in enumerate(unions) if scores.get(union) == best)
        parts[i : i + 2] = [unions[i]]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"settings": {"rope.scaling.type": "yarn"}}, "settings that are not read: rope.scaling"),
        ({"settings": {"expert_count": 4}}, "settings that are not read: expert_count"),
        ({"settings": {"rope.dimension_count": 4}}, "attention.key_length 8, but"),
        ({"settings": {"block_count": 10**9}}, "num_hidden_layers is too large"),
        ({"settings": {"attention.head_count": "4"}}, "expected a number"),
        ({"further": {"rope_freqs.weight": np.ones(4, np.float32)}}, "tensors that are not read"),
        ({"tokenizer": {"pre": "novel"}}, "splits texts as 'novel', which is not known"),
        ({"tokenizer": {"model": "t5"}}, "tokenizer 't5' is not read"),
        ({"tokenizer": {"bos_token_id": 10**6}}, "invalid bos_token_id 1000000"),
        ({"tokenizer": {"tokens": ["a"] * VOCABULARY}}, "has a token twice"),
        ({"tokenizer": {"token_type": [1]}}, "expected tokens with their types"),
    ],
)
def test_what_would_not_be_exact_is_refused(
    changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    assert reason in refusal(write(tmp_path / "tiny.gguf", **changes))


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    content = write(tmp_path / "tiny.gguf").read_bytes()
    (tmp_path / "other.gguf").write_bytes(content.replace(b"llama", b"mamba"))
    assert "architecture 'mamba' are not read; expected one of" in refusal(tmp_path / "other.gguf")


def replaced(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    return lambda content: content.replace(old, new, 1)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda content: content[:-100], "the file is cut: expected"),
        (lambda content: content[:300], "the file is cut: its header"),
        (lambda content: content[:10], "the file has 10 bytes"),
        (lambda content: b"GGML" + content[4:], "does not begin with GGUF"),
        (lambda content: content[:4] + b"\x09" + content[5:], "version 9 is not read"),
        (lambda content: content[:8] + b"\xff" * 8 + content[16:], "tensors; expected at most"),
        (lambda content: content[:16] + b"\xff" * 8 + content[24:], "metadata keys; expected"),
        (lambda content: content[:24] + b"\xff" * 8 + content[32:], "bytes in a text; expected"),
        (replaced(b"llama.context", b"\xff\xfe\xfdma.context"), "is not UTF-8"),
    ],
)
def test_a_damaged_header_is_refused_before_memory_is_allocated(
    change: Callable[[bytes], bytes], reason: str, tmp_path: Path
) -> None:
    content = write(tmp_path / "tiny.gguf").read_bytes()
    (tmp_path / "damaged.gguf").write_bytes(change(content))
    assert reason in refusal(tmp_path / "damaged.gguf")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert "the file does not exist" in refusal(tmp_path / "none.gguf")


def test_sizes_of_the_tiny_models_fit_the_common_ones() -> None:
    assert VOCABULARY == SIZES["vocab_size"] == len(BYTE_LEVEL["tokens"])
