"""The text decoder of a multimodal checkpoint gives the logits of the whole model for texts."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
)
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from januslens_server.errors import ModelFailed
from januslens_server.models.loader import ModelSource, load
from januslens_server.models.lora import load_lora
from januslens_server.models.matrices import Linear
from januslens_server.models.wrappers import FAMILIES
from januslens_server.results import MatrixKind
from tests.architectures.cases import (
    ALTERNATING,
    CONTEXT,
    LATENT_WIDTHS,
    ROUTED,
    SIZES,
    TOWER,
    VOCABULARY,
    WINDOW,
)
from tests.loading.test_lora import ALPHA, RANK, write
from tests.reference.examples import TOKENIZER

WEIGHTS = "model.safetensors"
TEXT = SIZES | {"num_key_value_heads": 2}
LLAMA = TEXT | {"model_type": "llama"}
QWEN = TEXT | {"model_type": "qwen2"}
THREE_AXES = {"rope_type": "default", "rope_theta": 500.0, "mrope_section": [1, 1, 2]}
INTERLEAVED = THREE_AXES | {"mrope_interleaved": True}
WINDOWS = {"layer_types": ALTERNATING, "sliding_window": WINDOW}
COHERE = TEXT | WINDOWS | {"model_type": "cohere2", "head_dim": 8, "logit_scale": 0.25}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
PATCHES = {"depth": 1, "num_heads": 2, "out_hidden_size": 32, "fullatt_block_indexes": [0]}
LINEAR = {
    "head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "rope_parameters": INTERLEAVED | {"partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0]},
}
HALF_ROTATED = THREE_AXES | {"partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0]}
GLM4V = (TEXT | {"rope_parameters": HALF_ROTATED}, TOWER | PATCHES)
WRAPPERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "aria": (
        TEXT | {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 2},
        TOWER | {"model_type": "idefics3_vision"},
    ),
    "aya_vision": (COHERE, TOWER),
    "cohere2_vision": (COHERE, TOWER),
    "cohere_compass": (
        TEXT
        | WINDOWS
        | {
            "logit_scale": 0.25,
            "rope_parameters": {
                "full_attention": None,
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            },
        },
        TOWER,
    ),
    "deepseek_vl": (LLAMA, TOWER),
    "emu3": (TEXT | {"pad_token_id": 0}, {}),
    "exaone4_5": (TEXT | WINDOWS | {"model_type": "exaone4"}, TOWER | PATCHES),
    "gemma3": (TEXT | WINDOWS | {"head_dim": 12, "query_pre_attn_scalar": 20}, TOWER),
    "gemma3n": (
        TEXT
        | {
            "head_dim": 8,
            "altup_num_inputs": 3,
            "hidden_size_per_layer_input": 6,
            "vocab_size_per_layer_input": VOCABULARY,
            "num_kv_shared_layers": 1,
            "layer_types": ["full_attention", "full_attention"],
            "pad_token_id": 0,
        },
        {"hidden_size": 16},
    ),
    "gemma4": (
        TEXT
        | WINDOWS
        | {
            "head_dim": 8,
            "global_head_dim": 16,
            "hidden_size_per_layer_input": 6,
            "vocab_size_per_layer_input": VOCABULARY,
            "num_kv_shared_layers": 0,
            "pad_token_id": 0,
        },
        TOWER | {"head_dim": 8},
    ),
    "glm46v": GLM4V,
    "glm4v": GLM4V,
    "glm4v_moe": (
        TEXT | ROUTED | {"head_dim": 8, "rope_parameters": HALF_ROTATED},
        TOWER | PATCHES,
    ),
    "glmga": GLM4V,
    "hyperclovax_vision_v2": (TEXT, TOWER | PATCHES),
    "got_ocr2": (QWEN, TOWER | {"output_channels": 16, "window_size": 2, "mlp_dim": 16}),
    "idefics2": (TEXT | {"model_type": "mistral", "sliding_window": WINDOW}, TOWER),
    "idefics3": (LLAMA, TOWER),
    "internvl": (QWEN, TOWER | {"image_size": [28, 28], "patch_size": [14, 14]}),
    "janus": (LLAMA, TOWER),
    "kimi_k25": (TEXT | LATENT_WIDTHS | ROUTED | {"model_type": "deepseek_v3"}, TOWER),
    "lfm2_vl": (TEXT | {"model_type": "lfm2", "layer_types": ["conv", "full_attention"]}, TOWER),
    "lfm3_vl": (TEXT | {"layer_types": ["conv", "full_attention"]}, TOWER),
    "lighton_ocr": (TEXT | {"model_type": "qwen3", "head_dim": 12}, TOWER),
    "llama4": (
        TEXT
        | {
            "head_dim": 8,
            "num_local_experts": 4,
            "intermediate_size_mlp": 48,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 4,
            "no_rope_layers": [1, 0],
        },
        TOWER | {"vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16},
    ),
    "llava": (LLAMA, TOWER | {"model_type": "clip_vision_model"}),
    "llava_next": (TEXT | {"model_type": "mistral", "sliding_window": WINDOW}, TOWER),
    "llava_next_video": (LLAMA, TOWER),
    "llava_onevision": (QWEN, TOWER),
    "minicpmv4_6": (TEXT | LINEAR, TOWER),
    "minicpmv4_7": (TEXT | LINEAR, TOWER),
    "mistral3": (TEXT | {"model_type": "mistral", "head_dim": 12}, TOWER),
    "mllama": (
        TEXT | {"num_hidden_layers": 4, "cross_attention_layers": [1, 2], "pad_token_id": 0},
        TOWER | {"image_size": 28, "vision_output_dim": 32},
    ),
    "ovis2": (QWEN, TOWER),
    "qianfan_ocr": (TEXT | {"model_type": "qwen3", "head_dim": 12}, TOWER),
    "qwen2_5_vl": (TEXT | {"rope_parameters": THREE_AXES}, TOWER | PATCHES),
    "qwen2_vl": (TEXT | {"rope_parameters": THREE_AXES}, PATCHES | {"embed_dim": 16}),
    "qwen3_5": (TEXT | LINEAR, TOWER | PATCHES),
    "qwen3_5_moe": (
        TEXT | LINEAR | EXPERTS | {"shared_expert_intermediate_size": 16},
        TOWER | PATCHES,
    ),
    "qwen3_vl": (
        TEXT | {"head_dim": 8, "rope_parameters": INTERLEAVED},
        TOWER | PATCHES | {"deepstack_visual_indexes": [0]},
    ),
    "qwen3_vl_moe": (
        TEXT | EXPERTS | {"head_dim": 8, "rope_parameters": INTERLEAVED},
        TOWER | PATCHES | {"deepstack_visual_indexes": [0]},
    ),
    "smolvlm": (LLAMA, TOWER),
    "video_llama_3": (QWEN, TOWER),
    "video_llava": (LLAMA, TOWER),
    "vipllava": (LLAMA, TOWER),
}
# Settings of the whole model.
WHOLE: dict[str, dict[str, Any]] = {
    "emu3": {
        "vocabulary_map": {"<image>": 110},
        "vq_config": {
            "base_channels": 32,
            "channel_multiplier": [1],
            "codebook_size": 8,
            "hidden_size": 16,
            "num_res_blocks": 1,
        },
    },
    "gemma3n": {
        "audio_config": {
            "hidden_size": 16,
            "conf_num_attention_heads": 2,
            "conf_num_hidden_layers": 1,
            "sscp_conv_channel_size": [4, 4],
        }
    },
    "ovis2": {"hidden_size": TEXT["hidden_size"], "vocab_size": VOCABULARY},
}


# In place of the tower for images of Gemma 3n, which needs timm; texts do not call it.
TIMM = torch.nn.Linear(4, 4)


def wrapped(family: str, folder: Path) -> Any:
    """Save a tiny random model that reads texts and images, and return it."""
    text, tower = WRAPPERS[family]
    settings = {"tie_word_embeddings": False, "image_token_id": 110} | WHOLE.get(family, {})
    config = CONFIG_MAPPING[family](  # type: ignore[call-arg]  # each family has its own
        text_config=text, vision_config=tower, **settings
    )
    with pytest.MonkeyPatch.context() as patch:
        if family == "gemma3n":
            of_text: Any = AutoModel.from_config
            patch.setattr(
                "transformers.models.gemma3n.modeling_gemma3n.AutoModel.from_config",
                lambda part: TIMM if part.model_type == "gemma3n_vision" else of_text(part),
            )
        network = saved(AutoModelForImageTextToText, config, folder)
    if family == "kimi_k25":  # transformers reads the published names, and saves others
        rename(folder, "language_model.model.blocks.", "language_model.model.layers.")
    if family == "gemma3n":  # published with weights that layers with shared keys do not use
        tensors = load_file(folder / WEIGHTS)
        unused = {
            name.replace("layers.0.", "layers.1."): values.clone()
            for name, values in tensors.items()
            if re.search(r"language_model\.layers\.0\.self_attn\.[kv]_", name)
        }
        assert unused.keys().isdisjoint(tensors)
        save_file(tensors | unused, folder / WEIGHTS, {"format": "pt"})
    if family == "qianfan_ocr":
        rename(folder, "language_model.model.encoder.", "language_model.model.")
    return network


def saved(kind: Any, config: PreTrainedConfig, folder: Path) -> Any:
    """Save a random model of an auto class with a tokenizer, and return it."""
    torch.manual_seed(len(config.model_type))
    network = kind.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    network.eval().save_pretrained(folder)
    for file in TOKENIZER.iterdir():
        shutil.copy(file, folder)
    return network


def rename(folder: Path, old: str, new: str) -> None:
    tensors = load_file(folder / WEIGHTS)
    renamed = {name.replace(old, new): values for name, values in tensors.items()}
    save_file(renamed, folder / WEIGHTS, {"format": "pt"})


@pytest.mark.parametrize("family", WRAPPERS)
def test_logits_of_texts_equal_those_of_the_whole_model(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # transformers 5.24 reads this of the result of Llama 4's text decoder, which has none.
    monkeypatch.setattr(MoeCausalLMOutputWithPast, "image_outputs", None, raising=False)
    network = wrapped(family, tmp_path)
    model = load(ModelSource("text", str(tmp_path)))
    prompt = torch.randint(1, 100, (1, 9), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = network(input_ids=prompt, attention_mask=torch.ones_like(prompt)).logits
        found = model.network(prompt).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert model.provenance.architecture.endswith(f" in {type(network).__name__}")
    assert model.view.facts.vocab_size == VOCABULARY
    held, whole = (sum(p.numel() for p in n.parameters()) for n in (model.network, network))
    assert held < whole


def test_every_family_is_measured() -> None:
    assert set(WRAPPERS) == FAMILIES


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model.", "model."])
def test_names_of_older_checkpoints_are_known(prefix: str, tmp_path: Path) -> None:
    """Published LLaVA has `language_model.model.layers`, Qwen2-VL `model.layers`."""
    network = wrapped("llava", tmp_path)
    path = tmp_path / WEIGHTS
    tensors = load_file(path)
    own = next(name for name in tensors if "layers.0.self_attn.q_proj" in name).split("layers.0")[0]
    assert any(name.startswith(own) for name in tensors)
    head = "language_model.lm_head." if prefix.startswith("language") else "lm_head."
    renamed = {}
    for name, values in tensors.items():
        if name.startswith(own) and "lm_head" not in name:
            renamed[f"{prefix}{name.removeprefix(own)}"] = values
        elif "lm_head." in name:
            renamed[f"{head}{name.split('lm_head.')[1]}"] = values
        else:
            renamed[name.removeprefix("model.")] = values
    save_file(renamed, path, {"format": "pt"})
    prompt = torch.arange(1, CONTEXT)[None, :9]
    with torch.inference_mode():
        expected = network(input_ids=prompt, attention_mask=torch.ones_like(prompt)).logits
        found = load(ModelSource("text", str(tmp_path))).network(prompt).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("family", "layer"), [("llava", 1), ("mllama", 3)])
def test_a_lora_of_the_whole_model_changes_the_text_decoder(
    family: str, layer: int, tmp_path: Path
) -> None:
    """Layers 1 and 2 of 4 of mllama attend to images: layer 3 is the decoder's layer 1."""
    wrapped(family, tmp_path / "model")
    base = load(ModelSource("text", str(tmp_path / "model")))
    torch.manual_seed(0)
    a, b = torch.randn(3, 32), torch.randn(32, 3)
    pairs = {f"model.language_model.layers.{layer}.self_attn.q_proj": (a, b)}
    tuned = load_lora("tuned", write(tmp_path / "lora", pairs), base)
    matrix = tuned.view.matrix((1, MatrixKind.Q, None))
    assert isinstance(matrix, Linear)
    own = base.network.get_parameter("model.layers.1.self_attn.q_proj.weight")
    torch.testing.assert_close(matrix.weight.T, own + ALPHA / RANK * b @ a)


def test_two_weights_of_one_name_are_refused(tmp_path: Path) -> None:
    wrapped("llava", tmp_path)
    path = tmp_path / WEIGHTS
    tensors = load_file(path)
    name = next(name for name in tensors if "layers.0.self_attn.q_proj" in name)
    tensors["model.layers" + name.split("layers")[1]] = torch.zeros_like(tensors[name])
    save_file(tensors, path, {"format": "pt"})
    assert "'model.layers.0.self_attn.q_proj.weight' twice: expected one" in refusal(tmp_path)


def refusal(folder: Path) -> str:
    with pytest.raises(ModelFailed) as refused:
        load(ModelSource("text", str(folder)))
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_weights_of_an_unknown_part_are_refused(tmp_path: Path) -> None:
    wrapped("llava", tmp_path)
    tensors = load_file(tmp_path / WEIGHTS) | {"prompt_encoder.weight": torch.ones(2, 2)}
    save_file(tensors, tmp_path / WEIGHTS, {"format": "pt"})
    assert "weights that config.json does not describe: prompt_encoder.weight" in refusal(tmp_path)


def test_wrappers_of_other_families_are_refused(tmp_path: Path) -> None:
    wrapped("llava", tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "deepseek_vl_hybrid"}))
    reason = refusal(tmp_path)
    assert "'deepseek_vl_hybrid' is a multimodal model whose text decoder is not read" in reason
    assert "expected a text model, or one of aria, aya_vision, " in reason


def test_a_published_wrapper_with_an_unread_decoder_is_refused_as_multimodal(
    tmp_path: Path,
) -> None:
    """Dots 3 has a text class of its own, whose configuration is part of the wrapper's."""
    wrapped("llava", tmp_path)
    path = tmp_path / "config.json"
    settings = {"model_type": "dots3_note", "architectures": ["Dots3NoteForConditionalGeneration"]}
    path.write_text(json.dumps(settings))
    assert "'dots3_note' is a multimodal model whose text decoder is not read" in refusal(tmp_path)


@pytest.mark.parametrize("family", ["emu3", "mllama"])
def test_a_text_decoder_stored_alone_gives_its_own_logits(family: str, tmp_path: Path) -> None:
    text, _ = WRAPPERS[family]
    whole = CONFIG_MAPPING[family](text_config=text)  # type: ignore[call-arg]
    network = saved(AutoModelForCausalLM, whole, tmp_path)
    model = load(ModelSource("text", str(tmp_path)))
    prompt = torch.arange(1, CONTEXT)[None, :9]
    with torch.inference_mode():
        expected = network(input_ids=prompt, use_cache=False).logits
        found = model.network(prompt).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert model.provenance.architecture == f"LlamaForCausalLM in {type(network).__name__}"
