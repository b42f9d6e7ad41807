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
    """Map a model's modules to the parts of a transformer.

    The structure of a family without an adapter is observed in a forward pass.

    Raises:
        ModelFailed: A part is missing, a parameter belongs to no known part, or the attention
            beyond a length that the configuration names is not reproduced.
    """
    adapter = ADAPTERS.get(model.config.model_type)
    if adapter is None:
        view = automatic.view(model)
    else:
        view = adapter(model)
        check_lengths(model, view, _of_any_type)
    check_parameters(model, view)
    return view


def _of_any_type(model: PreTrainedModel) -> ModelView:
    return ADAPTERS[model.config.model_type](model)
