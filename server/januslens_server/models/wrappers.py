"""Find the text decoder inside a multimodal checkpoint.

Many published models wrap a text decoder that also reads images or sound. Given only text, a family
of `FAMILIES` computes exactly what its text decoder computes alone, which
`tests/loading/test_wrappers.py` measures. Januslens serves the decoder and loads nothing else.
Tokens that stand for images are served as ordinary tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from januslens_server.errors import ModelFailed

FAMILIES = frozenset(
    """
    aria exaone4_5 gemma3 gemma4 glm46v glm4v glm4v_moe idefics2 idefics3 internvl kimi_k25 lfm2_vl
    lighton_ocr llama4 llava llava_next llava_next_video llava_onevision mistral3 qwen2_5_vl
    qwen2_vl qwen3_5 qwen3_5_moe qwen3_vl qwen3_vl_moe smolvlm vipllava
    """.split()
)
# Text decoders without a class of their own, and the family that computes the same. They rotate by
# time, height and width, which are all equal to the position in a text.
SAME = {
    "glm4v_moe_text": "glm4_moe",
    "glm4v_text": "glm4",
    "qwen2_5_vl_text": "qwen2",
    "qwen2_vl_text": "qwen2",
    "qwen3_vl_moe_text": "qwen3_moe",
    "qwen3_vl_text": "qwen3",
}
ONLY_IMAGES = ("mrope_section", "mrope_interleaved")

# Prefixes of the text decoder's stored weights, the longest first, and of its head.
PREFIXES = (
    "model.language_model.model.",
    "language_model.model.",
    "model.language_model.",
    "model.text_model.",
    "language_model.",
    "model.",
)
HEADS = ("language_model.lm_head.", "lm_head.")
# The first parts of the names of the other weights of such a checkpoint.
OTHER_PARTS = frozenset(
    """
    audio_tower connector embed_audio embed_vision image_newline mm_projector
    multi_modal_projector multimodal_projector patch_merger vision_embed vision_encoder
    vision_model vision_projection vision_tower visual
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
    if family not in FAMILIES:
        if _is_wrapper(config):
            raise ModelFailed(
                f"{family!r} is a multimodal model whose text decoder is not read: expected a text "
                f"model, or one of {', '.join(sorted(FAMILIES))}"
            )
        return None
    text: PreTrainedConfig = config.get_text_config()
    if text.model_type in SAME:
        settings: dict[str, Any] = text.to_dict()
        del settings["model_type"]
        settings["norm_topk_prob"] = True  # what the experts of Qwen3-VL always do
        if not settings.get("head_dim"):  # the other family may have another default
            settings["head_dim"] = settings["hidden_size"] // settings["num_attention_heads"]
        rotary: Mapping[str, Any] = settings.get("rope_parameters") or {}
        settings["rope_parameters"] = {k: v for k, v in rotary.items() if k not in ONLY_IMAGES}
        text = CONFIG_MAPPING[SAME[text.model_type]](**settings)
    if type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelFailed(
            f"the text decoder of {family!r} is {text.model_type!r}: expected a causal "
            "language model"
        )
    return text


def _is_wrapper(config: PreTrainedConfig) -> bool:
    """Whether the checkpoint is a multimodal model, and not a text decoder of its family."""
    whole = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(config.model_type)
    text = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    if whole in {None, text}:  # no wrapper, or one that AutoModelForCausalLM loads
        return False
    return text is None or whole in (config.architectures or ())


def wrapper_name(config: PreTrainedConfig) -> str:
    """Name of the class of a multimodal model."""
    return str(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[config.model_type])


def text_weights(stored: Mapping[str, Stored]) -> dict[str, Stored]:
    """Select the text decoder's weights of a wrapper, by their names without the wrapper.

    Weights of unknown parts keep their names, so that loading refuses them.

    Raises:
        ModelFailed: Two stored weights would have the same name.
    """
    prefix = next((p for p in PREFIXES if any(n.startswith(f"{p}layers.") for n in stored)), "")
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
        if own in found:
            raise ModelFailed(f"the checkpoint has the text decoder's {own!r} twice: expected one")
        found[own] = weight
    return found
