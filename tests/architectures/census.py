"""Load a tiny random model of every causal language model that transformers has; report its level.

Use `python -m tests.architectures.census [TYPE ...]`, or `make census` for all types. It writes the
rows of the named types to `census.jsonl` and the table of all rows to docs/guarantees.md. Each row
has the level by kind of layer, the largest error of the self-check, and why a layer has less than
level 3 or why there is no model.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as TYPES

from januslens_server.errors import ModelFailed
from januslens_server.models.loader import ModelSource, load
from januslens_server.pipelines.self_check import checked
from januslens_server.results import Level
from tests.architectures.cases import TOWER
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
DRAFTS = "it drafts tokens from the keys and values of another model and cannot run alone"
MUSIC = "it generates music, not text: codes of sound, with a head for each codebook"

# Settings of each of the transformers of BLT.
BYTES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "vocab_size": 1000,
}
INKLING = {
    "d_rel": 4,
    "n_layers_per_attn_res_block": 1,
    "rel_extent": 16,
    "sliding_window_size": 16,
    "swa_head_dim": 16,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "unpadded_vocab_size": 990,
}
# Settings by type, where the small ones do not fit; None leaves one of them out.
OWN: dict[str, dict[str, Any]] = {
    "axk2": {"num_key_value_heads": 4},
    "bamba": {"attn_layer_indices": [1]},
    "deepseek_v32": {"num_key_value_heads": 4},
    "dots3_note_text": {"num_key_value_heads": 4},
    "blt": {
        "decoder_config": BYTES | {"hidden_size_global": 64},
        "encoder_config": BYTES,
        "encoder_hash_byte_group_size": [3, 4],
        "encoder_hash_byte_group_vocab": 100,
        "global_config": BYTES,
        "local_attention_window_len": 16,
        "patcher_config": BYTES,
    },
    "cohere_compass_text": {
        "layer_types": ["full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": None,
            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
        },
    },
    "dbrx": {
        "attn_config": {"clip_qkv": 8, "kv_n_heads": 2, "rope_theta": 500.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots3_note": {
        "audio_config": {
            "adapter_input_size": 16,
            "adapter_out_dim": 64,
            "downsample_hidden_size": 16,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_attention_heads": 2,
            "num_hidden_layers": 1,
        },
        "text_config": {"num_key_value_heads": 4},
        "vision_config": {
            "adapter_in_dim": 16,
            "adapter_out_dim": 64,
            "hidden_size": 16,
            "intermediate_size": 16,
            "moe_intermediate_size": 16,
            "num_attention_heads": 2,
            "num_hidden_layers": 1,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "per_layer_config": {},
        },
    },
    "gemma3": {"vision_config": TOWER},
    "git": {"vision_config": TOWER},
    "got_ocr2": {
        "vision_config": TOWER
        | {"output_channels": 16, "window_size": 2, "mlp_dim": 16, "global_attn_indexes": [0]}
    },
    "inkling2_loop_text": INKLING
    | {"loop_layer_index_start": 1, "loop_layer_index_end": 2, "num_hidden_layers": 3}
    | {"layer_types": ["hybrid_sliding", "hybrid", "hybrid"]},
    "inkling2_text": INKLING,
    "mllama": {
        "text_config": {"num_hidden_layers": 3, "cross_attention_layers": [1]},
        "vision_config": TOWER,
    },
    "moss_transcribe_diarize": {
        "audio_config": {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_attention_heads": 2,
            "num_hidden_layers": 1,
        }
    },
    "phi4_multimodal": {
        "audio_config": {
            "ext_pw_out_channel": 16,
            "depthwise_separable_out_channel": 16,
            "hidden_size": 16,
            "intermediate_size": 16,
            "nemo_conv_channels": 16,
            "num_attention_heads": 2,
            "num_blocks": 1,
        },
        "vision_config": TOWER | {"crop_size": 28, "num_hidden_layers": 2},
    },
    "reformer": {
        "attn_layers": ["local", "lsh"],
        "axial_pos_embds": False,
        "feed_forward_size": 96,
        "is_decoder": True,
    },
    "xmod": {"default_language": "en_XX"},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "glm_moe_dsa": {"num_key_value_heads": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"head_dim": 8},
    "mamba2": {"num_heads": 8},
    "qwen4_exp_text": {
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
    },
    "recurrent_gemma": {
        "attention_window_size": 16,
        "block_types": ["recurrent", "attention"],
        "layer_types": None,
    },
    "zamba": {
        "layer_types": None,
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "num_hidden_layers": 3,
    },
    "zamba2": {"layer_types": None, "layers_block_type": ["linear_attention", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}
# Types that compute no text from a text alone, and what they do.
OTHER_TASKS = {
    "gemma4_assistant": DRAFTS,
    "gemma4_unified_assistant": DRAFTS,
    "musicgen": MUSIC,
    "musicgen_melody": MUSIC,
}
IDS = [5, 17, 44, 201, 9, 33]
MAX_PARAMETERS = 60_000_000

# Characters of a reason in the table.
LONGEST_REASON = 160

# The rows of the last census, and the page with its table between two marks.
RECORD = Path(__file__).with_name("census.jsonl")
PAGE = Path(__file__).parents[2] / "docs" / "guarantees.md"
BEGIN, END = "<!-- census -->", "<!-- end of census -->"
SECONDS = 90


class Entry(NamedTuple):
    """What became of a type: `served`, `refused`, or a model that transformers cannot build.

    `kinds` and `levels` have the kind and the level of each layer, and `heads` the layers that show
    the heads of a mixer. `error` is the largest of the self-check, and `reason` says why a layer
    has less than level 3 or why there is no model.
    """

    family: str
    state: str
    kinds: tuple[str, ...] = ()
    levels: tuple[int, ...] = ()
    error: float = 0.0
    reason: str = ""
    heads: tuple[int, ...] = ()


def entry(family: str) -> Entry:
    """Build, save, load and check a tiny model of a type."""
    if family in OTHER_TASKS:
        return Entry(family, "not built", reason=OTHER_TASKS[family])
    with tempfile.TemporaryDirectory() as name, _limited(SECONDS):
        folder = Path(name)
        try:
            built = _save(family, folder)
        except Exception as error:  # noqa: BLE001 - transformers raises anything for odd sizes
            return Entry(family, "not built", reason=_unbuilt(error))
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
    config: Any = model.network.config.get_text_config()
    kinds = tuple(getattr(config, "layer_types", None) or ("",) * len(levels))
    heads = tuple(layer for layer in range(len(levels)) if model.view.mixer_heads(layer))
    return Entry(family, state, kinds, levels, worst, reason, heads)


def _save(family: str, folder: Path) -> str:
    """Save a tiny model with a tokenizer; return why it is unusable, or an empty text."""
    base = transformers.AutoConfig.for_model(family)
    chosen: dict[str, Any] = _small(base) | OWN.get(family, {})
    text = getattr(base, "text_config", None)
    if text is not None and not isinstance(text, dict):
        chosen["text_config"] = _small(text) | chosen.get("text_config", {})
    torch.manual_seed(0)
    chosen = {name: value for name, value in chosen.items() if value is not None}
    config = transformers.AutoConfig.for_model(family, **chosen)
    network: Any = transformers.AutoModelForCausalLM.from_config(config)
    if sum(p.numel() for p in network.parameters()) > MAX_PARAMETERS:
        return "its parts that are not text are too large with the small settings"
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
    chosen: dict[str, Any] = {name: value for name, value in SMALL.items() if name in known}
    if "qk_rope_head_dim" in known:
        chosen.pop("head_dim", None)
    kinds = list(dict.fromkeys(getattr(config, "layer_types", None) or []))
    if len(kinds) > 1 and "layer_types" in known:  # one layer of each kind
        chosen |= {"layer_types": kinds, "num_hidden_layers": len(kinds)}
    return chosen


def _unbuilt(error: Exception) -> str:
    """Say in words why transformers does not build or run a type."""
    if isinstance(error, ImportError):
        return "it needs a package that is not installed"
    if isinstance(error, TimeoutError):
        return f"it {error}"
    return f"transformers cannot build or run it with the small settings ({type(error).__name__})"


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".split("\n", maxsplit=1)[0]


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


def table(entries: Iterable[Entry]) -> str:
    """Return the table of all types in Markdown, and a line that counts them."""
    entries = sorted(entries)
    lines = ["| type | level by kind of layer | error | why not level 3 |", "|---|---|---|---|"]
    for found in entries:
        error = f"{found.error:.0e}" if found.levels else ""
        reason = found.reason.replace("|", "\\|")
        if len(reason) > LONGEST_REASON:
            reason = f"{reason[:LONGEST_REASON]}..."
        lines.append(f"| {found.family} | {_shown_levels(found)} | {error} | {reason} |")
    served = [found for found in entries if found.state == "served"]
    full, shown = (
        sum(min(found.levels) >= level for found in served)
        for level in (Level.PARTS, Level.SUBLAYERS)
    )
    counts = Counter(found.state for found in entries)
    others = ", ".join(f"{counts[state]} {state}" for state in sorted(counts) if state != "served")
    summary = (
        f"Of {len(entries)} types, {len(served)} are served, {full} of them with level 3 in every "
        f"layer and {shown} with at least level 2; the others: {others}."
    )
    return "\n".join([summary, "", *lines])


def _shown_levels(found: Entry) -> str:
    if not found.levels:
        return found.state
    by_kind: dict[str, set[str]] = {}
    for layer, (kind, level) in enumerate(zip(found.kinds, found.levels, strict=True)):
        shown = f"{level} with heads" if layer in found.heads else str(level)
        by_kind.setdefault(kind, set()).add(shown)
    all_shown = {shown for each in by_kind.values() for shown in each}
    if len(all_shown) == 1:
        return all_shown.pop()
    return ", ".join(
        f"{kind} {' and '.join(sorted(each))}".strip() for kind, each in by_kind.items()
    )


def recorded() -> list[Entry]:
    """Read the rows of the last census."""
    rows = map(json.loads, RECORD.read_text().splitlines())
    lists = ("kinds", "levels", "heads")
    return [
        Entry(**row | {name: tuple(row[name]) for name in lists if name in row}) for row in rows
    ]


def record(entries: Iterable[Entry]) -> None:
    """Write rows, and the table into the page between its two marks."""
    entries = sorted(entries)
    RECORD.write_text("".join(json.dumps(found._asdict()) + "\n" for found in entries))
    before, rest = PAGE.read_text().split(BEGIN)
    _, after = rest.split(END)
    PAGE.write_text(f"{before}{BEGIN}\n\n{table(entries)}\n\n{END}{after}")


def main() -> None:
    """Take the census of the named types, by default of all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*", metavar="TYPE")
    asked = parser.parse_args().types
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    known = {found.family: found for found in recorded()} if RECORD.exists() and asked else {}
    for family in asked or sorted(TYPES):
        found = known[family] = entry(family)
        sys.stdout.write(f"{family:26} {_shown_levels(found):12} {found.reason[:150]}\n")
        sys.stdout.flush()
    record(known.values())


if __name__ == "__main__":
    main()
