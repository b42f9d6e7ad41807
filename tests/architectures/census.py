"""Load a tiny random model of every causal language model that transformers has; report its level.

Use `python -m tests.architectures.census [TYPE ...]`. It prints one line for each `model_type`: the
level by layer, the largest error of the self-check, and why a layer has less than level 3.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as TYPES

from januslens_server.errors import ModelFailed
from januslens_server.models.loader import ModelSource, load
from januslens_server.pipelines.self_check import checked
from tests.architectures.tiny_models import TOKENIZER

# Settings of the tiny models, by the names that families use.
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "max_position_embeddings": 64,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "n_inner": 96,
    "ffn_dim": 96,
    "word_embed_proj_dim": 64,
    "d_model": 64,
    "n_heads": 4,
    "n_layers": 2,
    "max_seq_len": 64,
    "head_dim": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "sliding_window": 16,
    "rotary_dim": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_layers": 2,
    "attention_heads": 4,
    "decoder_attention_heads": 4,
    "decoder_layers": 2,
    "decoder_ffn_dim": 96,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "shared_expert_intermediate_size": 32,
    "ffn_hidden_size": 96,
    "num_kv_heads": 2,
    "kv_channels": 16,
    "intermediate_size_mlp": 96,
    "global_head_dim": 16,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 1000,
    "moe_num_experts": 4,
    "moe_k": 2,
    "moe_layer_end_index": 1,
    "moe_layer_start_index": 1,
    "index_n_heads": 2,
    "index_head_dim": 8,
    "index_topk": 8,
}
IDS = [5, 17, 44, 201, 9, 33]
MAX_PARAMETERS = 60_000_000
SECONDS = 90


class Entry(NamedTuple):
    """What became of a type: `served`, `refused`, or a model that transformers cannot build.

    `levels` has the level of each layer, `error` is the largest of the self-check, and `reason`
    says why a layer has less than level 3 or why there is no model.
    """

    family: str
    state: str
    levels: tuple[int, ...] = ()
    error: float = 0.0
    reason: str = ""


def entry(family: str) -> Entry:
    """Build, save, load and check a tiny model of a type."""
    with tempfile.TemporaryDirectory() as name, _limited(SECONDS):
        folder = Path(name)
        try:
            built = _save(family, folder)
        except Exception as error:  # noqa: BLE001 - transformers raises anything for odd sizes
            return Entry(family, "not built", reason=_line(error))
        if built:
            return Entry(family, "not built", reason=built)
        try:
            model, guarantees = checked(load(ModelSource(family, str(folder))))
        except ModelFailed as error:
            return Entry(family, "refused", reason=str(error).removeprefix(f"{folder}: "))
        except Exception as error:  # noqa: BLE001 - to be reported as a fault of ours
            return Entry(family, "crashed", reason=_line(error))
    worst = max(guarantee.measured_error for guarantee in guarantees)
    state = "served" if all(guarantee.held for guarantee in guarantees) else "check failed"
    levels = tuple(int(found.level) for found in model.view.levels)
    reason = next((found.reason for found in model.view.levels if found.reason), "")
    return Entry(family, state, levels, worst, reason)


def _save(family: str, folder: Path) -> str:
    """Save a tiny model with a tokenizer; return why it is unusable, or an empty text."""
    base = transformers.AutoConfig.for_model(family)
    chosen: dict[str, Any] = _small(base)
    text = getattr(base, "text_config", None)
    if text is not None and not isinstance(text, dict):
        chosen["text_config"] = _small(text)
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **chosen)
    network: Any = transformers.AutoModelForCausalLM.from_config(config)
    if sum(p.numel() for p in network.parameters()) > MAX_PARAMETERS:
        return "too large with these settings"
    network.float().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        network(torch.tensor([IDS]), use_cache=False)
    network.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)
    return ""


def _small(config: Any) -> dict[str, Any]:
    known = set(config.to_dict()) | set(getattr(config, "attribute_map", None) or {})
    chosen = {name: value for name, value in SMALL.items() if name in known}
    if "qk_rope_head_dim" in known:
        chosen.pop("head_dim", None)
    return chosen


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".split("\n", maxsplit=1)[0][:200]


@contextmanager
def _limited(seconds: int) -> Iterator[None]:
    """Raise `TimeoutError` in this thread after some seconds."""

    def late(*_: object) -> None:
        raise TimeoutError(f"took longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def main() -> None:
    """Print the census of the named types, by default of all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*", metavar="TYPE")
    asked = parser.parse_args().types
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    counts: Counter[str] = Counter()
    for family in asked or sorted(TYPES):
        found = entry(family)
        level = f"level {min(found.levels)}" if found.levels else ""
        counts[f"{found.state} {level}".strip()] += 1
        levels = ",".join(map(str, found.levels))
        sys.stdout.write(
            f"{found.state:12} {family:26} {levels:8} {found.error:.1g} {found.reason[:150]}\n"
        )
        sys.stdout.flush()
    sys.stdout.write(f"{dict(counts)}\n")


if __name__ == "__main__":
    main()
