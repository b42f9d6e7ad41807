"""Models: from settings to sources, through what each goes through before it is served."""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence
from dataclasses import replace

from januslens_server.config import ServerSettings
from januslens_server.models.loading import ModelSource
from januslens_server.models.registry import Registry, SelfCheck, embedded_source
from januslens_server.models.resident import ResidentModel
from januslens_server.models.tensor_cache import TensorCache
from januslens_server.pipelines.cost import Pace, measured_pace
from januslens_server.pipelines.find_neurons import read_all_neurons
from januslens_server.pipelines.selfcheck import self_check
from januslens_server.results import Guarantee, ModelState, ModelStatus

logger = logging.getLogger("januslens_server")


def sources(settings: ServerSettings) -> list[ModelSource]:
    """The configured models, or the embedded one."""
    cache = None
    if settings.cache_dir is not None:
        cache = TensorCache(settings.cache_dir, settings.cache_size)
    named = [ModelSource(m.name, m.location, m.revision) for m in settings.models]
    return [
        replace(
            source,
            device=settings.device,
            data_type=settings.data_type,
            limits={memory.device: memory.size for memory in settings.max_memory},
            offload_dir=settings.offload_dir,
            cache=cache,
            row_cache_bytes=settings.row_cache,
            chunk_bytes=settings.chunk_bytes,
        )
        for source in named or [embedded_source()]
    ]


def check_with(paces: dict[str, Pace], *, index_neurons: bool) -> SelfCheck:
    """What a model goes through before it is served; its pace goes to `paces`."""

    def check(model: ResidentModel) -> Sequence[Guarantee]:
        guarantees = self_check(model)
        if all(guarantee.held for guarantee in guarantees):
            paces[model.name] = measured_pace(model)
            if index_neurons:
                read_all_neurons(model)
        return guarantees

    return check


def load_all(registry: Registry) -> None:
    """Load every model; from then on the garbage collector passes by what is there for good.

    Modules, vocabularies and torch's own objects are hundreds of thousands: to look through all
    of them takes a fifth of a second, which some request would wait.
    """
    registry.load_all()
    gc.collect()
    gc.freeze()


def log_state(status: ModelStatus) -> None:
    """One line for what has become of a model."""
    if status.state is ModelState.FAILED:
        logger.error("model %s FAILED: %s", status.name, status.reason)
    elif status.provenance is not None and status.facts is not None:
        where, facts = status.provenance, status.facts
        logger.info(
            "model %s READY: %s, %d layers of %d, %s on %s",
            status.name,
            where.architecture,
            facts.n_layers,
            facts.d_model,
            where.data_type,
            where.device,
        )
