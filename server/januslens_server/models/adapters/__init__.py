"""Adapters, one function per architecture family, registered by `config.model_type`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace

from transformers import PreTrainedModel

from januslens_server.errors import ModelFailed, WrongResults
from januslens_server.models.adapters import (
    alibi,
    automatic,
    gemma,
    gpt,
    llama,
    mixture,
    parallel,
    stream,
)
from januslens_server.models.adapters.observed_modules import with_modules
from januslens_server.models.lengths import check_lengths
from januslens_server.models.views import ModelView, without_unread_parameters

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

    The structure of a family without an adapter is observed in a forward pass. Only the residual
    stream, and the sublayers that add up to what the block adds, are shown of a block with a
    missing part, with a parameter that belongs to no known part, or whose attention is not
    reproduced beyond a length that the configuration names.

    Raises:
        ModelFailed: The model has no residual stream, or its own results are wrong.
    """
    adapter = ADAPTERS.get(model.config.model_type)
    if adapter is None:
        return with_modules(model, without_unread_parameters(model, automatic.view(model)))
    try:
        view = adapter(model)
    except WrongResults:
        raise
    except ModelFailed as error:
        return with_modules(model, stream.view(model, str(error)))
    try:
        check_lengths(model, view, _of_any_type)
    except ModelFailed as error:
        view = view.coarsened(dict.fromkeys(range(view.facts.n_layers), str(error)))
    known = inspect.signature(model.forward).parameters
    view = replace(
        view, cache_argument=next((name for name in stream.CACHES if name in known), None)
    )
    return with_modules(model, without_unread_parameters(model, view))


def _of_any_type(model: PreTrainedModel) -> ModelView:
    return ADAPTERS[model.config.model_type](model)
