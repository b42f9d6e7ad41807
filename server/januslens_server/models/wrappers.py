"""Find the text decoder inside a multimodal checkpoint.

Many published models wrap a text decoder that also reads images or sound. Given only text, a family
of `FAMILIES` computes exactly what its text decoder computes alone, which
`tests/loading/test_wrappers.py` measures. Januslens serves the decoder and loads nothing else.
Tokens that stand for images are served as ordinary tokens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from dataclasses import replace
from typing import Any, TypeVar

from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from januslens_server.errors import ModelFailed
from januslens_server.models.quantized import DenseWeight

FAMILIES = frozenset(
    """
    aria aya_vision cohere2_vision cohere_compass deepseek_vl emu3 exaone4_5 gemma3 gemma3n gemma4
    glm46v glm4v glm4v_moe glmga got_ocr2 hyperclovax_vision_v2 idefics2 idefics3 internvl janus
    kimi_k25 lfm2_vl lfm3_vl lighton_ocr llama4 llava llava_next llava_next_video llava_onevision
    minicpmv4_6 minicpmv4_7 mistral3 mllama ovis2 qianfan_ocr qwen2_5_vl qwen2_vl qwen3_5
    qwen3_5_moe qwen3_vl qwen3_vl_moe smolvlm video_llama_3 video_llava vipllava
    """.split()
)
# Text decoders that AutoModelForCausalLM does not load, and the family that computes the same. Most
# rotate by time, height and width, which are all equal to the position in a text. Those of Llama
# 3.2 Vision (mllama) pass a text through the layers with self-attention alone.
SAME = {
    "emu3_text_model": "llama",
    "glm4v_moe_text": "glm4_moe",
    "glm4v_text": "glm4",
    "mllama_text_model": "llama",
    "qwen2_5_vl_text": "qwen2",
    "qwen2_vl_text": "qwen2",
    "qwen3_vl_moe_text": "qwen3_moe",
    "qwen3_vl_text": "qwen3",
}
ONLY_IMAGES = ("mrope_section", "mrope_interleaved")

# Families whose whole model does not multiply logits by the text decoder's `logit_scale`.
UNSCALED = frozenset({"aya_vision", "cohere2_vision"})

# Prefixes of the text decoder's stored weights, the longest first, and of its head.
PREFIXES = (
    "model.language_model.model.",
    "language_model.model.",
    "model.language_model.",
    "model.text_model.",
    "text_model.model.",
    "language_model.",
    "model.",
)
HEADS = ("language_model.lm_head.", "text_model.lm_head.", "lm_head.")
LAYER = re.compile(r"model\.layers\.(\d+)\.")
EMBEDDING = "model.embed_tokens.weight"
# The first parts of the names of the other weights of such a checkpoint.
OTHER_PARTS = frozenset(
    """
    aligner audio_tower connector embed_audio embed_vision generation_aligner generation_embeddings
    generation_head image_newline image_tower merger mlp1 mm_projector multi_modal_projector
    multimodal_projector patch_merger projector video_tower vision_embed vision_encoder vision_model
    vision_projection vision_projector vision_tower visual visual_embeddings_table vqmodel
    """.split()
)

Stored = TypeVar("Stored")


def text_decoder(config: PreTrainedConfig) -> PreTrainedConfig | None:
    """Return the configuration of a multimodal model's text decoder; None for other models.

    Raises:
        ModelFailed: The model is of a family that is not known to compute the same without images,
            or its text decoder is of a family that transformers cannot build alone.
    """
    family = config.model_type
    if family not in FAMILIES and family not in SAME:
        if _is_wrapper(config):
            raise ModelFailed(
                f"{family!r} is a multimodal model whose text decoder is not read: expected a text "
                f"model, or one of {', '.join(sorted(FAMILIES))}"
            )
        return None
    text: PreTrainedConfig = config.get_text_config()
    if text.model_type in SAME:
        text = _same(text)
    if type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelFailed(
            f"the text decoder of {family!r} is {text.model_type!r}: expected a causal "
            "language model"
        )
    if family in UNSCALED:
        text.logit_scale = 1.0
    return text


def _same(text: PreTrainedConfig) -> PreTrainedConfig:
    """Return the configuration of the family that computes the same for texts."""
    settings: dict[str, Any] = text.to_dict()
    del settings["model_type"]
    settings["norm_topk_prob"] = True  # what the experts of Qwen3-VL always do
    if not settings.get("head_dim"):  # the other family may have another default
        settings["head_dim"] = settings["hidden_size"] // settings["num_attention_heads"]
    rotary: Mapping[str, Any] = settings.get("rope_parameters") or {}
    settings["rope_parameters"] = {k: v for k, v in rotary.items() if k not in ONLY_IMAGES}
    settings["num_hidden_layers"] -= len(_only_images(text) & set(range(text.num_hidden_layers)))
    return CONFIG_MAPPING[SAME[text.model_type]](**settings)


def _only_images(text: PreTrainedConfig) -> Set[int]:
    """Return the layers that attend to images alone: a text skips them."""
    return frozenset(getattr(text, "cross_attention_layers", None) or ())


def _is_wrapper(config: PreTrainedConfig) -> bool:
    """Whether the checkpoint is a multimodal model, and not a text decoder of its family."""
    whole = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(config.model_type)
    text = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    if whole in {None, text}:  # no wrapper, or one that AutoModelForCausalLM loads
        return False
    return text is None or whole in (config.architectures or ())


def wrapper_name(config: PreTrainedConfig) -> str:
    """Name of the class of a multimodal model, or of its text decoder if it is stored alone."""
    own = (config.architectures or [config.model_type])[0]
    return str(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(config.model_type, own))


def dense_text_weights(
    stored: Mapping[str, DenseWeight], text: PreTrainedConfig
) -> dict[str, DenseWeight]:
    """Select the text decoder's weights as `text_weights` does, without rows for image tokens.

    The embedding of Llama 3.2 Vision has more rows than its output head.
    """
    found = text_weights(stored, text)
    embedding, rows = found.get(EMBEDDING), text.vocab_size
    if _only_images(text) and embedding is not None and embedding.shape[0] > rows:
        read, shape = embedding.read, (rows, *embedding.shape[1:])
        found[EMBEDDING] = replace(embedding, shape=shape, read=lambda: read()[:rows])
    return found


def text_weights(stored: Mapping[str, Stored], text: PreTrainedConfig) -> dict[str, Stored]:
    """Select the text decoder's weights of a wrapper, by their names without the wrapper.

    Layers are numbered without those that a text skips. Weights of unknown parts keep their names,
    so that loading refuses them.

    Raises:
        ModelFailed: Two stored weights would have the same name.
    """
    prefix = next((p for p in PREFIXES if any(n.startswith(f"{p}layers.") for n in stored)), "")
    skipped = _only_images(text)
    found: dict[str, Stored] = {}
    for name, weight in stored.items():
        head = next((head for head in HEADS if name.startswith(head)), None)
        if head is not None:
            own = f"lm_head.{name.removeprefix(head)}"
        elif name.removeprefix("model.").split(".", 1)[0] in OTHER_PARTS:
            continue
        else:
            inside = prefix and name.startswith(prefix)
            own = f"model.{name.removeprefix(prefix)}" if inside else name
        if (layer := LAYER.match(own)) is not None:
            number = int(layer[1])
            if number in skipped:
                continue
            kept = number - sum(other < number for other in skipped)
            own = f"model.layers.{kept}.{own.removeprefix(layer[0])}"
        if own in found:
            raise ModelFailed(f"the checkpoint has the text decoder's {own!r} twice: expected one")
        found[own] = weight
    return found
