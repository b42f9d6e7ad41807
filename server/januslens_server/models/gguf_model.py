"""Build transformers' configuration and weights from a GGUF file, or refuse the file.

transformers' own reader ignores metadata and tensors that it does not know. They may change the
numbers, so a file with them is refused here, as is a setting that transformers does not apply.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig

from januslens_server.errors import ModelFailed, shortlist
from januslens_server.models.gguf_families import FAMILIES
from januslens_server.models.gguf_family import (
    ATTRIBUTES,
    DEFAULT_BASE,
    FREQUENCIES,
    FURTHER,
    LINEAR,
    LOCAL_BASE,
    REQUIRED,
    UNEMBEDDING,
    YARN,
    Family,
    Settings,
    frequency_divisors,
    number,
    real,
)
from januslens_server.models.gguf_file import ADVICE, GGUFHeader, StoredTensor
from januslens_server.models.vetting import check_keys

# Settings that are real numbers. All others count something.
REAL = {
    "attention.layer_norm_epsilon",
    "attention.layer_norm_rms_epsilon",
    "attention.scale",
    "attn_logit_softcapping",
    "embedding_scale",
    "expert_weights_scale",
    "final_logit_softcapping",
    "logit_scale",
    "residual_scale",
    "rope.freq_base",
    "rope.scaling.factor",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
}
# Scaling of rotary embeddings. A factor without a type divides positions, as in llama.cpp.
SCALING_TYPE, SCALING_FACTOR, UNSCALED = "rope.scaling.type", "rope.scaling.factor", "none"
# YaRN's settings and their names in transformers. The first two are required; for the others,
# transformers and llama.cpp use the same values.
YARN_SETTINGS = {
    SCALING_FACTOR: "factor",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
    "rope.scaling.yarn_beta_fast": "beta_fast",
    "rope.scaling.yarn_beta_slow": "beta_slow",
}
# The settings of Llama 3's frequencies that all of its checkpoints share (Llama 3.1 to 3.3). The
# factor is the largest divisor.
LLAMA_3: Mapping[str, Any] = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LAYER = re.compile(r"(?<=\.)(\d+)\.")
TOLERANCE = 1e-6


def read_configuration(header: GGUFHeader) -> PreTrainedConfig:
    """Build transformers' configuration from the metadata.

    Raises:
        ModelFailed: The architecture is not read, or a setting has no counterpart.
    """
    family = _family(header)
    settings, own, scaling = _settings(header, family)
    attributes = {**ATTRIBUTES, **family.attributes}
    described: dict[str, Any] = {attributes[key]: value for key, value in settings.items()}
    described |= family.common
    described["tie_word_embeddings"] = UNEMBEDDING not in header.tensors
    if "token_embd.weight" in header.tensors:
        described["vocab_size"] = header.tensors["token_embd.weight"].shape[-1]
    if family.model_type == "gpt2":
        described["n_inner"] = described.pop("intermediate_size", None)
    described |= family.describe(header, own, described)
    model_type = described.pop("model_type", family.model_type)
    if family.scalings and "rope_parameters" not in described:
        described.setdefault("rope_theta", DEFAULT_BASE)
        rotary = _rotary(header, family, own, scaling, described)
        if rotary or family.local_base:
            base = described.pop("rope_theta")
            described["rope_parameters"] = _with_base(family, own, rotary, base)
    elif scaling:
        raise ModelFailed(
            f"the file has settings that are not read: {shortlist(sorted(scaling))}; {ADVICE}"
        )
    end = _end_id(header, described.get("vocab_size", 0))
    check_keys(header.path.name, described)
    config: Any = CONFIG_MAPPING[model_type](  # type: ignore[call-arg]  # any of its class
        eos_token_id=end, bos_token_id=None, pad_token_id=None, **described
    )
    for key, value in settings.items():
        _check_setting(key, value, attributes[key], config)
    checked: PreTrainedConfig = config
    return checked


def _family(header: GGUFHeader) -> Family:
    if header.metadata.get("split.count", 1) != 1:
        raise ModelFailed(
            "the file is one of several parts; expected the whole model. Join them: "
            "llama-gguf-split --merge FIRST_PART.gguf FILE.gguf (from llama.cpp)"
        )
    if header.architecture not in FAMILIES:
        raise ModelFailed(
            f"GGUF files of architecture {header.architecture!r:.80} are not read; expected one of "
            f"{', '.join(sorted(FAMILIES))}; {ADVICE}"
        )
    return FAMILIES[header.architecture]


def _settings(
    header: GGUFHeader, family: Family
) -> tuple[dict[str, float], dict[str, Any], dict[str, Any]]:
    """Return the settings of the architecture, all of which are known.

    Those that the family describes itself and those of the scaling come apart, as they are stored.
    """
    prefix = f"{header.architecture}."
    settings = {
        key.removeprefix(prefix): value
        for key, value in header.metadata.items()
        if key.startswith(prefix)
    }
    required = REQUIRED | family.required | {family.epsilon}
    if "expert_count" in settings:
        required |= {"expert_used_count"}
    missing = sorted(required - settings.keys())
    own = {key: settings.pop(key) for key in family.own & settings.keys()}
    scaled = {SCALING_TYPE, *YARN_SETTINGS} & settings.keys()
    scaling = {key: settings.pop(key) for key in scaled}
    if unknown := sorted(settings.keys() - ATTRIBUTES.keys() - family.attributes.keys()):
        raise ModelFailed(
            f"the file has settings that are not read: {shortlist(unknown)}; {ADVICE}"
        )
    if missing:
        raise ModelFailed(f"the file lacks the settings {shortlist(missing)}; {ADVICE}")
    return {key: _setting(key, value) for key, value in settings.items()}, own, scaling


def _setting(key: str, value: object) -> float:
    """Return a setting: a number above 0, and a whole one unless its key is in `REAL`."""
    return real(key, value) if key in REAL else number(key, value)


def _check_setting(key: str, value: float, attribute: str, config: Any) -> None:
    """Refuse a setting that transformers does not apply."""
    fields = type(config).__dataclass_fields__
    if attribute == "rope_theta":
        rotary = getattr(config, "rope_parameters", None) or {}
        found = rotary.get("full_attention", rotary).get("rope_theta")
    elif attribute == "head_dim":
        width = config.hidden_size // config.num_attention_heads
        # GPT-2 reads no head_dim; others do even if their configuration does not declare it.
        found = width if config.model_type == "gpt2" else getattr(config, "head_dim", None) or width
    elif attribute == "intermediate_size" and config.model_type == "gpt2":
        found = config.n_inner
    elif {attribute, config.attribute_map.get(attribute)} & fields.keys():
        found = getattr(config, attribute)
    else:
        found = None  # the configuration keeps any attribute, but its model does not read this one
    if not isinstance(found, int | float) or not math.isclose(found, value, rel_tol=TOLERANCE):
        raise ModelFailed(
            f"the file has {key} {value!r}, but transformers uses {attribute} {found!r}; {ADVICE}"
        )


def _end_id(header: GGUFHeader, n_tokens: int) -> int | None:
    found = header.metadata.get("tokenizer.ggml.eos_token_id")
    if found is None or (type(found) is int and 0 <= found < n_tokens):
        return found
    raise ModelFailed(f"invalid eos_token_id {found!r:.80}; expected 0 to {n_tokens - 1}")


def _rotary(
    header: GGUFHeader,
    family: Family,
    own: Settings,
    scaling: Settings,
    described: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the parameters of scaled rotary embeddings without their base; empty if unscaled."""
    kind = scaling.get(SCALING_TYPE, LINEAR if SCALING_FACTOR in scaling else UNSCALED)
    if FREQUENCIES in family.tensors & header.tensors.keys():
        if kind != UNSCALED:
            raise ModelFailed(f"the file scales its rotary embeddings twice; {ADVICE}")
        whole = described["hidden_size"] // max(1, described["num_attention_heads"])
        return _llama_3(header, described.get("head_dim", whole))
    if kind == UNSCALED:
        return {}
    read = YARN_SETTINGS if kind == YARN else {SCALING_FACTOR: "factor"}
    if kind not in family.scalings or scaling.keys() - {SCALING_TYPE, *read}:
        raise ModelFailed(
            f"the file has rope.scaling {kind!r:.80} with {shortlist(sorted(scaling))}; expected "
            f"{' or '.join(map(repr, family.scalings))} without further settings, or "
            f"{UNSCALED!r}; {ADVICE}"
        )
    if missing := sorted(set(list(read)[:2]) - scaling.keys()):
        raise ModelFailed(f"the file lacks the settings {shortlist(missing)} of its rope.scaling")
    found = {name: _setting(key, scaling[key]) for key, name in read.items() if key in scaling}
    return {"rope_type": kind} | found | (family.yarn(own) if kind == YARN else {})


def _with_base(
    family: Family, own: Settings, rotary: Mapping[str, Any], base: float
) -> dict[str, Any]:
    """Return the parameters with their base, by kind of layer if there are several."""
    scaled = {"rope_type": "default", **rotary, "rope_theta": base}
    if not family.local_base:
        return scaled
    local_base = real(LOCAL_BASE, own.get(LOCAL_BASE, DEFAULT_BASE))
    local = {"rope_type": "default", "rope_theta": local_base}
    return {"full_attention": scaled, "sliding_attention": local}


def _llama_3(header: GGUFHeader, d_head: float) -> dict[str, Any]:
    """Return Llama 3's rotary parameters; refuse a file with other divisors of frequencies.

    With the wavelength w of a frequency, the factor f and the original context c, the divisor is
    1 for w < c / 4, f for w > c, and between them 1 / ((1 - t) / f + t) with t = (c / w - 1) / 3
    (Llama 3.1's `apply_scaling`; the converters of llama.cpp store the divisors).
    """
    stored = frequency_divisors(header, d_head)
    base = float(header.metadata.get("llama.rope.freq_base", DEFAULT_BASE))
    steps = np.arange(len(stored)) / len(stored)
    wavelengths = 2 * math.pi * base**steps
    factor, context = float(stored.max()), LLAMA_3["original_max_position_embeddings"]
    low, high = LLAMA_3["low_freq_factor"], LLAMA_3["high_freq_factor"]
    between = np.clip((context / wavelengths - low) / (high - low), 0, 1)
    if not np.allclose(stored, 1 / ((1 - between) / factor + between), rtol=1e-5, atol=0):
        raise ModelFailed(
            f"the file has {FREQUENCIES} with other divisors than those of Llama 3; {ADVICE}"
        )
    return {**LLAMA_3, "factor": factor}


def read_weights(
    header: GGUFHeader, skeleton: nn.Module, data_type: torch.dtype
) -> dict[str, torch.Tensor]:
    """Read all tensors, dequantised to float32 and then converted to `data_type`.

    `skeleton` is the model on the meta device; its parameters get their names in the file from the
    `gguf` library and the family.

    Raises:
        ModelFailed: The file has tensors that are no parameters of the model, or of another size.
    """
    family, config = FAMILIES[header.architecture], cast("Any", skeleton.config)
    described = skeleton.state_dict()
    sources = _sources(header, family, described, config)
    read = {name for found in sources.values() for name in found}
    if f"{header.architecture}.{FURTHER}" in header.metadata:
        read |= {name for name in header.tensors if _layer(name) >= config.num_hidden_layers}
    if unused := sorted(header.tensors.keys() - read - family.tensors):
        raise ModelFailed(f"the file has tensors that are not read: {shortlist(unused)}; {ADVICE}")
    weights: dict[str, torch.Tensor] = {}
    for parameter, names in sources.items():
        if not names or not all(name in header.tensors for name in names):
            continue
        stored, expected = [header.tensors[name] for name in names], described[parameter].shape
        if sum(tensor.size for tensor in stored) != expected.numel():
            shapes = " and ".join(str(list(tensor.shape[::-1])) for tensor in stored)
            raise ModelFailed(
                f"tensor {' and '.join(map(repr, names))} has shape {shapes}: expected "
                f"{list(expected)}"
            )
        values = family.restore(parameter, [_dequantised(header, t) for t in stored], config)
        if _without_ones(values.shape) == _without_ones(expected):
            values = values.reshape(expected)  # conversions drop sizes of 1
        weights[parameter] = values.to(data_type)
    return weights


def _layer(name: str) -> int:
    """The layer of a stored tensor; -1 for one of no layer."""
    found = LAYER.search(name)
    return int(found[1]) if found else -1


def _without_ones(shape: torch.Size) -> list[int]:
    return [size for size in shape if size != 1]


def _dequantised(header: GGUFHeader, tensor: StoredTensor) -> torch.Tensor:
    """Read a tensor in float32. The first size in the file is that of the last dimension."""
    import gguf  # noqa: PLC0415 - optional

    n_rows = max(1, math.prod(tensor.shape[1:]))
    rows = header.stored_bytes(tensor).reshape(-1, tensor.n_bytes // n_rows)
    try:
        found = gguf.dequantize(rows, gguf.GGMLQuantizationType[tensor.kind])
    except NotImplementedError as error:
        raise ModelFailed(f"tensors of type {tensor.kind} are not read; {ADVICE}") from error
    return torch.from_numpy(np.array(found, np.float32)).reshape(tensor.shape[::-1])


def _sources(
    header: GGUFHeader, family: Family, parameters: Mapping[str, torch.Tensor], config: Any
) -> dict[str, list[str]]:
    """Return the stored tensors of each parameter: several for a stack of experts' matrices."""
    import gguf  # noqa: PLC0415 - optional

    numbers = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    known = gguf.get_tensor_name_map(numbers[header.architecture], config.num_hidden_layers)

    def sources(parameter: str) -> list[str]:
        for ending, stored in family.stored.items():
            if parameter.endswith(ending) and (layer := LAYER.search(parameter)):
                return [f"blk.{layer[1]}.{name}" for name in stored.split(" ")]
        stem, _, suffix = parameter.rpartition(".")
        for module, replacement in family.modules.items():
            stem = stem.replace(module, replacement)
        if stem.endswith(".experts"):
            matrix = suffix.removesuffix("_bias")
            kind = "weight" if matrix == suffix else "bias"
            parts = family.stacks.get(matrix, ())
            return [f"{known.get_name(f'{stem}.{part}')}.{kind}" for part in parts]
        if found := known.get_name(stem):
            return [f"{found}.{suffix}"]
        vector = known.get_name(parameter)  # such as the sinks of attention
        return [] if vector is None else [f"{vector}.weight"]

    return {parameter: sources(parameter) for parameter in parameters}
