"""Model folders of tiny random models."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from januslens_server.lens.head import CHUNK_BYTES
from januslens_server.models.loader import ModelSource
from januslens_server.models.placement import memory_needed
from januslens_server.models.resident import ROW_CACHE_BYTES
from tests.architectures.cases import Case
from tests.architectures.tiny_models import plain
from tests.reference.examples import TOKENIZER


def saved(case: Case, folder: Path) -> ModelSource:
    """Save the case's model on the CPU with a tokenizer, as transformers does."""
    plain(case).save_pretrained(folder)
    for file in TOKENIZER.iterdir():
        shutil.copy(file, folder)
    return ModelSource(case.family, str(folder))


def weight_bytes(case: Case) -> int:
    return sum(p.numel() * p.element_size() for p in plain(case).parameters())


def room_for(case: Case, part: float) -> dict[str, int]:
    """Return limits under which the CPU holds about a `part` of the model's weights."""
    with torch.device("meta"):
        skeleton: Any = AutoModelForCausalLM.from_config(case.config(), dtype=torch.float32)
    beside = memory_needed(skeleton, CHUNK_BYTES, ROW_CACHE_BYTES).beside_weights
    return {"cpu": beside + int(part * weight_bytes(case))}
