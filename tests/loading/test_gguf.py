"""GGUF files give the model, the numbers and the tokens that were written to them, or an error."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Regex, pre_tokenizers
from transformers import AutoModelForCausalLM, GemmaTokenizer
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from januslens_server.errors import ModelFailed
from januslens_server.models.gguf_families import FAMILIES
from januslens_server.models.gguf_file import read_header
from januslens_server.models.gguf_tokenizer import SPLITS, read_gguf_vocabulary
from januslens_server.models.loader import ModelSource, load
from januslens_server.models.resident import ResidentModel
from tests.architectures.cases import SIZES, VOCABULARY
from tests.architectures.tiny_models import plain
from tests.loading.gguf_files import (
    BYTE,
    BYTE_LEVEL,
    CASES,
    CONTROL,
    NORMAL,
    UNKNOWN,
    write,
)
from tests.loading.test_quantized import FOUR_BIT_FLOATS


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
    if family != "falcon-h1 with multipliers":  # they are factors of the weights
        for name, values in expected.state_dict().items():
            torch.testing.assert_close(model.network.state_dict()[name], values, rtol=0, atol=3e-7)
    prompt = torch.tensor([CASES[family].prompt])
    found, logits = model.network(prompt).logits, expected(prompt).logits
    torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-4)
    assert model.provenance.quantization == ""
    assert model.end_ids == {1}


@pytest.mark.parametrize("family", ["lfm2", "qwen35", "qwen35moe"])
def test_transformers_reads_the_same_model_from_the_file(family: str, tmp_path: Path) -> None:
    """Its reader of GGUF files has names, permutations and settings of its own."""
    path = write(tmp_path / "tiny.gguf", family)
    expected = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    )
    model, prompt = loaded(path), torch.tensor([CASES[family].prompt])
    for name, values in expected.state_dict().items():
        torch.testing.assert_close(model.network.state_dict()[name], values, rtol=0, atol=3e-7)
    torch.testing.assert_close(
        model.network(prompt).logits, expected(prompt).logits, rtol=1e-4, atol=1e-4
    )


def test_a_factor_without_a_type_divides_positions(tmp_path: Path) -> None:
    """As in llama.cpp, whose type of scaling is linear unless the file has another one."""
    model = loaded(write(tmp_path / "tiny.gguf", settings={"rope.scaling.factor": 4.0}))
    rotary: Any = model.network.model.rotary_emb
    unscaled = 500.0 ** (-np.arange(len(rotary.inv_freq)) / len(rotary.inv_freq))
    np.testing.assert_allclose(rotary.inv_freq.numpy(), unscaled / 4, rtol=1e-6)


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


def test_quantized_experts_are_those_that_gguf_dequantizes(tmp_path: Path) -> None:
    model = loaded(write(tmp_path / "tiny.gguf", "mixtral", quantized="Q8_0"))
    assert model.provenance.architecture == "MixtralForCausalLM"
    name, kind = "model.layers.1.mlp.experts.gate_up_proj", gguf.GGMLQuantizationType.Q8_0
    experts = plain(CASES["mixtral"]).state_dict()[name].numpy()
    halves = [gguf.quantize(half, kind) for half in np.split(experts, 2, axis=1)]
    expected = np.concatenate([gguf.dequantize(half, kind) for half in halves], axis=1)
    np.testing.assert_array_equal(model.network.state_dict()[name].numpy(), expected)
    assert model.provenance.quantization == "GGUF Q8_0"


def test_mxfp4_blocks_are_read_as_the_standard_defines_them(tmp_path: Path) -> None:
    """An exponent and sixteen bytes, with the codes `i` and `i + 16` of a block in byte `i`."""
    drawn, (experts, rows, columns) = np.random.default_rng(0), (4, 64, 32)
    codes = drawn.integers(0, 16, (experts, rows, columns)).astype(np.uint8)
    exponents = drawn.integers(120, 126, (experts, rows, 1)).astype(np.uint8)
    stored = np.concatenate([exponents, codes[..., :16] | codes[..., 16:] << 4], -1)
    path = write(tmp_path / "tiny.gguf", "gpt-oss", further={"blk.1.ffn_up_exps.weight": stored})
    model = loaded(path)
    values = np.array(FOUR_BIT_FLOATS, np.float32)[codes]
    values *= 2.0 ** (exponents.astype(np.float32) - 127)
    found = model.network.state_dict()["model.layers.1.mlp.experts.gate_up_proj"]
    np.testing.assert_array_equal(found[..., 1::2].numpy(), values.swapaxes(1, 2))
    assert model.provenance.quantization == "GGUF MXFP4"


PUBLISHED_SPLITS = sorted(SPLITS.keys() & GGUF_PRE_TOKENIZER_SPLITS.keys())


@pytest.mark.parametrize("split", PUBLISHED_SPLITS)
def test_texts_are_split_by_the_expression_that_transformers_has(split: str) -> None:
    expression = pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS[split]), "isolated")
    texts = (
        "Don't we'LL camelCaseWords ÉCOLEété \u01c5a ʰx हिन्दी नमस्ते e\u0301a 日本語abc",
        "1234567 ٣٤٥ x2 3.14 a/b//\n/ c ...\r\n\n  d\t \u00a0e  ",
        " !?hello (world) _x_ 'S 'RE O'Neil",
    )
    for text in texts:
        places = [place for _, place in expression.pre_tokenize_str(text)]
        found = [place for _, place in SPLITS[split]().pre_tokenize_str(text)]
        assert found == places


@pytest.mark.parametrize(
    ("split", "stated", "begins"),
    [
        ("llama-bpe", None, True),
        ("tekken", None, True),
        ("gpt-4o", None, False),
        ("qwen2", None, False),
        ("qwen2", True, True),
        ("llama-bpe", False, False),
    ],
)
def test_a_file_that_does_not_say_it_begins_texts_with_bos_as_llama_cpp(
    split: str, stated: bool | None, begins: bool, tmp_path: Path
) -> None:
    described = {"pre": split} | ({} if stated is None else {"add_bos_token": stated})
    path = write(tmp_path / "tiny.gguf", tokenizer=described)
    found = [token.id for token in read_gguf_vocabulary(read_header(path)).encode_prompt("ab")]
    assert (found[0] == BYTE_LEVEL["bos_token_id"]) == begins


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("gpt-2", ["1234", "Ġ", "ab", "abc"]),
        ("smollm", ["1", "2", "3", "4", "Ġ", "ab", "abc"]),
        ("llama-bpe", ["123", "4", "Ġ", "ab", "abc"]),
        ("qwen2", ["1", "2", "3", "4", "Ġ", "ab", "abc"]),
        ("starcoder", ["1", "2", "3", "4", "Ġ", "ab", "abc"]),
        ("olmo", ["1234", "Ġ", "ab", "abc"]),
        ("gpt-4o", ["123", "4", "Ġ", "ab", "abc"]),
        ("deepseek-v3", ["123", "4", "Ġ", "ab", "abc"]),
        ("hunyuan-dense", ["123", "4", "Ġ", "ab", "abc"]),
    ],
)
def test_texts_are_split_as_the_named_tokenizer_splits_them(
    split: str, expected: list[str], tmp_path: Path
) -> None:
    path = write(tmp_path / "tiny.gguf", tokenizer={"pre": split, "add_bos_token": False})
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


def test_gemma_4_merges_in_the_order_of_its_list(tmp_path: Path) -> None:
    """Compared with transformers' tokenizer, in which no pair of the list is out of order."""
    letters, merges = ["▁", *"abcdé"], ["a b", "▁ ab", "c d", "b c", "ab cd", "▁ab c", "▁ ▁"]
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{i:02X}>" for i in range(80))]
    tokens += [*letters, *(merge.replace(" ", "") for merge in merges)]
    kinds = [CONTROL] * 5 + [BYTE] * 80
    tokens += [f"<unused{i}>" for i in range(VOCABULARY - len(tokens))]
    described = {
        "model": "gemma4",
        "tokens": tokens,
        "token_type": kinds + [NORMAL] * (VOCABULARY - len(kinds)),
        "merges": merges,
        "bos_token_id": 2,
        "unknown_token_id": 3,
        "add_space_prefix": False,
        "add_bos_token": True,
    }
    vocabulary = read_gguf_vocabulary(
        read_header(write(tmp_path / "tiny.gguf", tokenizer=described))
    )
    pairs: Any = [tuple(merge.split(" ")) for merge in merges]
    expected = GemmaTokenizer(vocab={text: i for i, text in enumerate(tokens)}, merges=pairs)
    drawn = random.Random(0)
    for _ in range(200):
        text = "".join(drawn.choices([" ", *"abcdé!"], k=12))
        ids = [token.id for token in vocabulary.encode_prompt(text)]
        assert ids == [2, *expected.backend_tokenizer.encode(text, add_special_tokens=False).ids]


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
        ({"settings": {"rope.scaling.type": "longrope"}}, "'longrope' with rope.scaling.type; exp"),
        ({"settings": {"rope.scaling.type": "linear"}}, "lacks the settings rope.scaling.factor"),
        ({"settings": {"rope.scaling.type": "yarn"}}, "rope.scaling.original_context_length of"),
        (
            {"settings": {"rope.scaling.factor": 2.0, "rope.scaling.yarn_beta_fast": 8.0}},
            "'linear' with rope.scaling.factor, rope.scaling.yarn_beta_fast; expected",
        ),
        ({"settings": {"rope.scaling.yarn_attn_factor": 0.5}}, "not read: rope.scaling.yarn_attn"),
        ({"settings": {"attention.scale": 0.5}}, "settings that are not read: attention.scale"),
        ({"settings": {"expert_count": 4}}, "lacks the settings expert_used_count"),
        ({"settings": {"expert_weights_scale": 2.0}}, "not read: expert_weights_scale"),
        ({"settings": {"rope.dimension_count": 4}}, "attention.key_length 8, but"),
        ({"settings": {"embedding_length": 34}}, "tiny.gguf: Class validation error"),
        ({"settings": {"split.count": 3}}, "Join them: llama-gguf-split --merge FIRST_PART.gguf"),
        ({"settings": {"block_count": 10**9}}, "num_hidden_layers is too large"),
        ({"settings": {"attention.head_count": "4"}}, "expected a whole number"),
        (
            {"further": {"rope_freqs.weight": np.arange(1, 5, dtype=np.float32)}},
            "rope_freqs.weight with other divisors than those of Llama 3",
        ),
        (
            {"further": {"rope_freqs.weight": np.ones(5, np.float32)}},
            "5 values in rope_freqs.weight for heads of 8 dimensions; expected half as many",
        ),
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


@pytest.mark.parametrize(
    ("family", "settings", "reason"),
    [
        ("lfm2", {"attention.head_count_kv": [0, 2]}, "2 values of attention.head_count_kv for 3"),
        ("lfm2", {"attention.head_count_kv": [1, 2, 0]}, "head_count_kv 1, 2, 0; expected one"),
        ("lfm2", {"attention.head_count_kv": [-1, 2, 0]}, "invalid setting attention.head_count_k"),
        ("gemma4", {"attention.head_count_kv": [2, 2, 1, 2, 2]}, "other numbers of heads or neur"),
        ("gemma4", {"feed_forward_length": [64, 64, 96, 96, 96]}, "other numbers of heads or neur"),
        ("gemma4", {"attention.shared_kv_layers": 5}, "other numbers of heads or neurons"),
        ("gemma4", {"attention.sliding_window_pattern": [2] * 5}, "expected true or false"),
        ("gemma4", {"attention.value_length": 8}, "has several values of attention.key_length, at"),
        ("gemma4", {"rope.freq_base_swa": "x"}, "invalid setting rope.freq_base_swa 'x'"),
        ("gemma4", {"block_count": 10**6}, "tensors for 1000000 layers; expected more"),
        ("qwen35", {"nextn_predict_layers": 5}, "invalid setting block_count 5; expected a whole"),
        ("qwen35", {"block_count": 10**6}, "tensors for 999999 layers; expected more"),
        ("qwen35", {"ssm.inner_size": 25}, "has 6 heads in 25 dimensions"),
        ("qwen35", {"rope.dimension_sections": [2, 2, 2]}, "sections [2, 2, 2] for 8 dimensions"),
        ("qwen35", {"full_attention_interval": 0}, "invalid setting full_attention_interval 0"),
        ("phi3", {"rope.scaling.type": "longrope"}, "has LongRoPE without rope_factors_short.weig"),
        (
            "phi3",
            {"rope.scaling.type": "yarn"},
            "8 of 8 dimensions with rope.scaling 'yarn'; expec",
        ),
        ("phi3", {"rope.dimension_count": 10}, "the file rotates 10 of 8 dimensions"),
        (
            "phi3 with LongRoPE",
            {"rope.scaling.attn_factor": 1.5},
            "has rope.scaling.attn_factor 1.5, but transformers uses 1.29",
        ),
        ("qwen3next", {"ssm.inner_size": 48}, "ssm_conv1d.weight' has shape [48, 3]: expected [72"),
        ("mistral3", {"attention.temperature_scale": 0.1}, "temperature_scale without YaRN"),
        (
            "mistral3",
            {
                "attention.temperature_scale": 0.1,
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 2.0,
                "rope.scaling.original_context_length": 8,
            },
            "lacks the setting attention.temperature_scale or rope.scaling.yarn_log_multiplier",
        ),
        ("lfm2moe", {"expert_gating_func": 1}, "router is not the model's: expected expert_gating"),
        ("deepseek2", {"expert_gating_func": 1}, "router is not the model's: expected exper"),
        ("deepseek2", {"attention.head_count_kv": 4}, "has [4, 16, 12] heads and widths of latent"),
        (
            "deepseek2",
            {"attention.key_length_mla": 4},
            "attention.key_length_mla 4; expected a who",
        ),
        ("deepseek2", {"rope.scaling.type": "none"}, "yarn_log_multiplier without YaRN"),
        ("deepseek2", {"expert_group_used_count": 0}, "invalid setting expert_group_used_count 0"),
        ("gpt2", {"rope.scaling.factor": 2.0}, "not read: rope.scaling.factor; serve the checkp"),
    ],
)
def test_what_a_family_cannot_have_is_refused(
    family: str, settings: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    assert reason in refusal(write(tmp_path / "tiny.gguf", family, settings=settings))


def test_divisors_that_are_no_partial_rotation_are_refused(tmp_path: Path) -> None:
    changed = {"rope_freqs.weight": np.array([1, 2, *[1e30] * 6], np.float32)}
    path = write(tmp_path / "tiny.gguf", "gemma4", further=changed)
    assert "rope_freqs.weight with divisors that are not read" in refusal(path)


def test_maps_of_other_shapes_are_refused(tmp_path: Path) -> None:
    keys = np.zeros((4, 6, 12), np.float32)  # not transposed
    path = write(tmp_path / "tiny.gguf", "deepseek2", further={"blk.0.attn_k_b.weight": keys})
    assert "have shapes [[4, 6, 12], [4, 8, 12]]: expected [[4, 12, 6], [4, 8, 12]]" in (
        refusal(path)
    )


def test_rows_that_are_split_elsewhere_are_refused(tmp_path: Path) -> None:
    changed = {"qkv": np.zeros((66, 32), np.float32), "gate": np.zeros((6, 32), np.float32)}
    further = {f"blk.0.attn_{name}.weight": values for name, values in changed.items()}
    path = write(tmp_path / "tiny.gguf", "qwen3next", further=further)
    assert "has 66 and 6 rows for a delta network: expected 48 and 24" in refusal(path)


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


def test_the_documentation_names_what_is_read() -> None:
    text = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
    section = text.partition("### GGUF files")[2].partition("### LoRA")[0]
    named = set(re.findall(r"`([\w.-]+)`", section))
    assert FAMILIES.keys() | SPLITS.keys() <= named


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert "the file does not exist" in refusal(tmp_path / "none.gguf")


def test_sizes_of_the_tiny_models_fit_the_common_ones() -> None:
    assert VOCABULARY == SIZES["vocab_size"] == len(BYTE_LEVEL["tokens"])
