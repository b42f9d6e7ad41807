"""Adapters, one function per architecture family, registered by `config.model_type`."""

from __future__ import annotations

from collections.abc import Callable

from transformers import PreTrainedModel

from januslens_server.models.adapters import alibi, automatic, gemma, gpt, llama, mixture, parallel
from januslens_server.models.lengths import check_lengths
from januslens_server.models.views import ModelView, check_parameters

ADAPTERS: dict[str, Callable[[PreTrainedModel], ModelView]] = {
    "bloom": alibi.bloom,
    "cohere": parallel.cohere,
    "falcon": alibi.falcon,
    "gemma": gemma.gemma,
    "gemma2": gemma.gemma2,
    "gemma3": gemma.gemma3,
    "gemma3_text": gemma.gemma3_text,
    "gpt2": gpt.gpt2,
    "gpt_neo": gpt.gpt_neo,
    "gpt_neox": gpt.gpt_neox,
    "gpt_oss": mixture.gpt_oss,
    "gptj": gpt.gptj,
    "granite": llama.granite,
    "llama": llama.llama,
    "mistral": llama.mistral,
    "mixtral": mixture.mixtral,
    "mpt": alibi.mpt,
    "olmo": llama.olmo,
    "olmo2": llama.olmo2,
    "olmoe": mixture.olmoe,
    "opt": gpt.opt,
    "phi": parallel.phi,
    "phi3": llama.phi3,
    "qwen2": llama.qwen2,
    "qwen3": llama.qwen3,
    "qwen3_moe": mixture.qwen3_moe,
    "smollm3": llama.smollm3,
    "stablelm": parallel.stablelm,
    "starcoder2": llama.starcoder2,
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
