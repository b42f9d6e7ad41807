"""One adapter per architecture family, registered by `config.model_type`."""

from __future__ import annotations

from collections.abc import Callable

from transformers import PreTrainedModel

from januslens_server.models import automatic
from januslens_server.models.accounting import check_parameters
from januslens_server.models.adapters import (
    bloom,
    cohere,
    falcon,
    gemma,
    gemma2,
    gemma3_text,
    gpt2,
    gpt_neo,
    gpt_neox,
    gpt_oss,
    gptj,
    granite,
    llama,
    mistral,
    mixtral,
    mpt,
    olmo,
    olmo2,
    olmoe,
    opt,
    phi,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
    smollm3,
    stablelm,
    starcoder2,
)
from januslens_server.models.lengths import check_lengths
from januslens_server.models.views import ModelView

ADAPTERS: dict[str, Callable[[PreTrainedModel], ModelView]] = {
    "bloom": bloom.view,
    "cohere": cohere.view,
    "falcon": falcon.view,
    "gemma": gemma.view,
    "gemma2": gemma2.view,
    "gemma3": gemma3_text.view_with_vision,
    "gemma3_text": gemma3_text.view,
    "gpt2": gpt2.view,
    "gpt_neo": gpt_neo.view,
    "gpt_neox": gpt_neox.view,
    "gpt_oss": gpt_oss.view,
    "gptj": gptj.view,
    "granite": granite.view,
    "llama": llama.view,
    "mistral": mistral.view,
    "mixtral": mixtral.view,
    "mpt": mpt.view,
    "olmo": olmo.view,
    "olmo2": olmo2.view,
    "olmoe": olmoe.view,
    "opt": opt.view,
    "phi": phi.view,
    "phi3": phi3.view,
    "qwen2": qwen2.view,
    "qwen3": qwen3.view,
    "qwen3_moe": qwen3_moe.view,
    "smollm3": smollm3.view,
    "stablelm": stablelm.view,
    "starcoder2": starcoder2.view,
}


def view_of(model: PreTrainedModel) -> ModelView:
    """The model's parts under the field's names.

    A family without an adapter is read by its structure. Raises `ModelFailed` naming what was not
    found: a part, the part that a parameter belongs to, the meaning of a length.
    """
    reader = ADAPTERS.get(model.config.model_type)
    if reader is None:
        view = automatic.view(model)
    else:
        view = reader(model)
        check_lengths(model, view, _of_any_type)
    check_parameters(model, view)
    return view


def _of_any_type(model: PreTrainedModel) -> ModelView:
    return ADAPTERS[model.config.model_type](model)
