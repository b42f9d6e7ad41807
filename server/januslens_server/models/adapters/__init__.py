"""One adapter per architecture family, registered by `config.model_type`."""

from __future__ import annotations

from collections.abc import Callable

from transformers import PreTrainedModel

from januslens_server.errors import ModelFailed
from januslens_server.models.adapters import gpt2, gpt_neo, gptj, llama
from januslens_server.models.views import ModelView

ADAPTERS: dict[str, Callable[[PreTrainedModel], ModelView]] = {
    "gpt2": gpt2.view,
    "gpt_neo": gpt_neo.view,
    "gptj": gptj.view,
    "llama": llama.view,
}


def view_of(model: PreTrainedModel) -> ModelView:
    """The model's parts under the field's names.

    Raises `ModelFailed` for a family without an adapter.
    """
    family = model.config.model_type
    adapter = ADAPTERS.get(family)
    if adapter is None:
        known = ", ".join(sorted(ADAPTERS))
        raise ModelFailed(f"expected an architecture among {known}, got {family!r}")
    return adapter(model)
