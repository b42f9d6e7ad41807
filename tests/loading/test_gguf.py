"""GGUF files give the model, the numbers and the tokens that were written to them, or an error."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Regex, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from januslens_server.errors import ModelFailed
from januslens_server.models.gguf_file import read_header
from januslens_server.models.gguf_tokenizer import SPLITS, read_gguf_vocabulary
from januslens_server.models.loader import ModelSource, load
from januslens_server.models.resident import ResidentModel
from tests.architectures.cases import GRANITE_MULTIPLIERS, SIZES, VOCABULARY, Case
from tests.architectures.tiny_models import plain
from tests.loading.test_quantized import FOUR_BIT_FLOATS

WIDE = {"intermediate_size": 64}  # Q8_0 stores blocks of 32 values
HEADS = {"head_dim": 12, "num_key_value_heads": 2}
GEMMA = HEADS | {"query_pre_attn_scalar": 12, "sliding_window": 4, "tie_word_embeddings": True}
LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LOCAL_AND_SCALED = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 500.0, "factor": 8.0},
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
FEW_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
EXPERTS = FEW_EXPERTS | {"moe_intermediate_size": 32}
CASES = {
    "gpt2": Case("gpt2", "gguf", {"n_inner": 64, "tie_word_embeddings": True}),
    "llama": Case("llama", "gguf", WIDE | {"num_key_value_heads": 2, "rope_theta": 500.0}),
    "qwen2": Case("qwen2", "gguf", WIDE | {"num_key_value_heads": 2}),
    "qwen3": Case("qwen3", "gguf", WIDE | HEADS),
    "llama 3": Case(
        "llama", "gguf, 3", WIDE | {"num_key_value_heads": 2, "rope_parameters": LLAMA_3}
    ),
    "qwen3 with YaRN": Case("qwen3", "gguf, YaRN", WIDE | HEADS | {"rope_parameters": YARN}),
    "gpt-oss": Case(
        "gpt_oss",
        "gguf",
        WIDE
        | {"head_dim": 16, "num_key_value_heads": 2, "sliding_window": 4}
        | {"num_local_experts": 4, "num_experts_per_tok": 2}
        | {"rope_parameters": YARN | {"truncate": False}},
    ),
    "qwen3moe": Case("qwen3_moe", "gguf", WIDE | HEADS | EXPERTS | {"norm_topk_prob": True}),
    "qwen2moe": Case(
        "qwen2_moe",
        "gguf",
        WIDE
        | EXPERTS
        | {"num_key_value_heads": 2, "shared_expert_intermediate_size": 96}
        | {"norm_topk_prob": False},
    ),
    "mixtral": Case(
        "mixtral",
        "gguf",
        WIDE | {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "olmo2": Case("olmo2", "gguf", WIDE | {"num_key_value_heads": 2}),
    "olmoe": Case(
        "olmoe", "gguf", {"intermediate_size": 32, "num_key_value_heads": 2} | FEW_EXPERTS
    ),
    "phi3": Case("phi3", "gguf", WIDE | {"num_key_value_heads": 2, "sliding_window": 4}),
    "granite": Case("granite", "gguf", WIDE | GRANITE_MULTIPLIERS | {"num_key_value_heads": 2}),
    "granitemoe": Case(
        "granitemoe",
        "gguf",
        WIDE
        | GRANITE_MULTIPLIERS
        | {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "smollm3": Case(
        "smollm3",
        "gguf",
        WIDE
        | {
            "num_key_value_heads": 2,
            "no_rope_layers": None,
            "num_hidden_layers": 4,
            "tie_word_embeddings": True,
        },
    ),
    "starcoder2": Case(
        "starcoder2", "gguf", WIDE | {"num_key_value_heads": 2, "sliding_window": None}
    ),
    "gemma": Case("gemma", "gguf", WIDE | HEADS | {"tie_word_embeddings": True}),
    "gemma2": Case("gemma2", "gguf", WIDE | GEMMA | {"final_logit_softcapping": 3.0}),
    "gemma3 scaled": Case(
        "gemma3_text",
        "gguf, scaled",
        WIDE
        | GEMMA
        | {"layer_types": None, "num_hidden_layers": 6, "rope_parameters": LOCAL_AND_SCALED},
    ),
    "gemma3": Case("gemma3_text", "gguf", WIDE | GEMMA | {"layer_types": None}),
}
# The architecture's name in the file, of cases that are named otherwise.
ARCHITECTURES = {
    "llama 3": "llama",
    "mixtral": "llama",
    "gemma3 scaled": "gemma3",
    "qwen3 with YaRN": "qwen3",
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
    whole = rotary.get("full_attention", rotary)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    found |= {
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": width,
        "attention.value_length": width,
        "rope.freq_base": float(whole["rope_theta"]),
    }
    if whole["rope_type"] == "linear":
        found |= {"rope.scaling.type": "linear", "rope.scaling.factor": whole["factor"]}
    if whole["rope_type"] == "yarn":
        found |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": whole["factor"],
            "rope.scaling.original_context_length": whole["original_max_position_embeddings"],
            "rope.scaling.yarn_beta_fast": 32.0,
            "rope.scaling.yarn_beta_slow": 1.0,
        }
    if family == "starcoder2":
        return found | {"attention.layer_norm_epsilon": config.norm_epsilon}
    found["attention.layer_norm_rms_epsilon"] = config.rms_norm_eps
    if family in {"gpt-oss", "phi3"}:
        found["attention.sliding_window"] = config.sliding_window
    if family in {"granite", "granitemoe"}:
        found |= {
            "attention.scale": config.attention_multiplier,
            "embedding_scale": config.embedding_multiplier,
            "residual_scale": config.residual_multiplier,
            "logit_scale": config.logits_scaling,
        }
    found |= experts_of(family, config)
    if family in {"gemma2", "gemma3"}:
        found["attention.sliding_window"] = config.sliding_window
    if family == "gemma2":
        found["attn_logit_softcapping"] = config.attn_logit_softcapping
        found["final_logit_softcapping"] = config.final_logit_softcapping
    return found


def experts_of(family: str, config: Any) -> dict[str, Any]:
    """The metadata of a mixture; none for other models."""
    if not hasattr(config, "num_local_experts") and not hasattr(config, "num_experts"):
        return {}
    found = {"expert_count": 4, "expert_used_count": 2}
    found["feed_forward_length"] = config.intermediate_size
    if family == "qwen2moe":
        found["expert_shared_feed_forward_length"] = config.shared_expert_intermediate_size
    if family == "gpt-oss":
        found["expert_feed_forward_length"] = config.intermediate_size
    if family in {"qwen2moe", "qwen3moe"}:
        found["expert_feed_forward_length"] = config.moe_intermediate_size
    return found


def tensors_of(family: str, case: Case) -> dict[str, np.ndarray]:
    """The tensors as conversions to GGUF write them, by their names there."""
    network = plain(case)
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family)
    names = gguf.get_tensor_name_map(kind, network.config.num_hidden_layers)
    written = {}
    for parameter, values in unstacked(family, network.state_dict()):
        if parameter == "lm_head.weight" and network.config.tie_word_embeddings:
            continue
        stem, _, suffix = parameter.rpartition(".")
        array = values.numpy()
        if family == "granitemoe":  # newer names than those that the library knows
            stem = stem.replace("block_sparse_moe.experts", "mlp.experts")
            stem = stem.replace("router", "router.layer")
        name = f"{names.get_name(stem)}.{suffix}"
        rotated = family in {"granite", "granitemoe", "llama", "smollm3"}
        if rotated and ("attn_q." in name or "attn_k." in name):
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
        if ".ffn_gate_inp_shexp." in name:
            array = array.squeeze()
        written[name] = np.ascontiguousarray(array)
    if case.name == "gguf, 3":
        written["rope_freqs.weight"] = divisors(network)
    return written


def unstacked(family: str, weights: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Give each matrix of the experts a name of its own, as older checkpoints do."""
    for name, values in weights.items():
        if family == "gpt-oss" and ".experts." in name:
            kind = "bias" if name.endswith("_bias") else "weight"
            stored, matrix = values if kind == "bias" else values.mT, name.removesuffix("_bias")
            if matrix.endswith("gate_up_proj"):
                yield matrix.replace("gate_up_proj", f"gate_proj.{kind}"), stored[:, 0::2]
                yield matrix.replace("gate_up_proj", f"up_proj.{kind}"), stored[:, 1::2]
            else:
                yield f"{matrix}.{kind}", stored
        elif name.endswith(".sinks"):
            yield f"{name}.weight", values
        elif name.endswith("experts.gate_up_proj"):
            gate, up = values.chunk(2, dim=1)
            yield name.replace("gate_up_proj", "gate_proj.weight"), gate
            yield name.replace("gate_up_proj", "up_proj.weight"), up
        elif name.endswith("experts.down_proj"):
            yield f"{name}.weight", values
        else:
            yield name, values


def divisors(network: Any) -> np.ndarray:
    """What transformers divides the unscaled frequencies by."""
    found = network.model.rotary_emb.inv_freq.double().numpy()
    unscaled = 500000.0 ** (-np.arange(len(found)) / len(found))
    divided: np.ndarray = (unscaled / found).astype(np.float32)
    return divided


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
    family = ARCHITECTURES.get(family, family)
    writer = gguf.GGUFWriter(path, family)
    for key, value in (settings_of(family, case) | (settings or {})).items():
        add(writer, f"{family}.{key}", value)
    for key, value in (BYTE_LEVEL | (tokenizer or {})).items():
        add(writer, f"tokenizer.ggml.{key}", value)
    for name, array in (tensors_of(family, case) | (further or {})).items():
        if array.dtype == np.uint8:
            writer.add_tensor(name, array, raw_dtype=gguf.GGMLQuantizationType.MXFP4)
        elif quantized is None or array.ndim < 2 or array.shape[-1] % 32:
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
