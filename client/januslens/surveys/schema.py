"""The columns of a survey's tables; docs/surveys.md describes them."""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa

INTEGER, NUMBER, TEXT = pa.int32(), pa.float32(), pa.string()
INTEGERS, NUMBERS, TEXTS = pa.list_(INTEGER), pa.list_(NUMBER), pa.list_(TEXT)

_PROMPT = {"prompt": pa.int64()}
_MATRIX = {"layer": INTEGER, "kind": TEXT, "expert": INTEGER}
_LISTED = {"top_token_ids": INTEGERS, "top_tokens": TEXTS, "top_probabilities": NUMBERS}
_PROJECTION = {
    **_LISTED,
    "top_logits": NUMBERS,
    "bottom_token_ids": INTEGERS,
    "bottom_tokens": TEXTS,
    "bottom_probabilities": NUMBERS,
    "bottom_logits": NUMBERS,
    "entropy_bits": NUMBER,
    "log_normalizer": NUMBER,
    "target_rank": INTEGER,
    "target_probability": NUMBER,
    "target_logit": NUMBER,
    "target_log_probability": NUMBER,
}
_OUTCOME = {
    "target_token_id": INTEGER,
    "target": TEXT,
    "probability": NUMBER,
    "log_probability": NUMBER,
    "logit": NUMBER,
    "rank": INTEGER,
    "logit_difference": NUMBER,
}

# The columns of each table after `prompt`, the number of the prompt. The table `prompts` also has
# a column for each label.
COLUMNS: Mapping[str, Mapping[str, pa.DataType]] = {
    "prompts": {
        "id": TEXT,
        "text": TEXT,
        "messages": pa.list_(pa.struct({"role": TEXT, "content": TEXT})),
        "target": TEXT,
        "other": TEXT,
        "subject": TEXT,
        "token_count": INTEGER,
    },
    "failures": {
        "id": TEXT,
        "reason": TEXT,
        "message": TEXT,
        "request_id": TEXT,
    },
    "tokens": {
        "position": INTEGER,
        "token_id": INTEGER,
        "text": TEXT,
        "raw": pa.binary(),
        "start": INTEGER,
        "end": INTEGER,
        "message": INTEGER,
    },
    "targets": {
        "position": INTEGER,
        "target_token_id": INTEGER,
        "target": TEXT,
        "predicted_token_id": INTEGER,
        "predicted": TEXT,
        "target_probability": NUMBER,
        "target_log_probability": NUMBER,
        "target_rank": INTEGER,
        "target_logit": NUMBER,
        "logit_difference": NUMBER,
        "constant_logit_contribution": NUMBER,
    },
    "nodes": {
        "id": TEXT,
        "kind": TEXT,
        "layer": INTEGER,
        "position": INTEGER,
        "head": INTEGER,
        "source_position": INTEGER,
        "neuron": INTEGER,
        "expert": INTEGER,
        "norm": NUMBER,
        "activation": NUMBER,
        "gradient_norm": NUMBER,
        **_PROJECTION,
        "sum": TEXT,
        "share": NUMBER,
        "attention": NUMBER,
        "logit_contribution": NUMBER,
        "attribution": NUMBER,
    },
    "edges": {
        "layer": INTEGER,
        "source": TEXT,
        "target": TEXT,
        "kind": TEXT,
        "weight": NUMBER,
        "share": NUMBER,
        "attention": NUMBER,
        "logit_contribution": NUMBER,
        "overlap": NUMBER,
        "attribution": NUMBER,
    },
    "state_gradients": {"id": TEXT, "layer": INTEGER, "position": INTEGER, **_PROJECTION},
    "losses": {
        "loss": pa.float64(),
        "predicted_token_id": INTEGER,
        "predicted": TEXT,
        "target_token_ids": INTEGERS,
        "targets": TEXTS,
    },
    "matrices": {
        **_MATRIX,
        "d_in": INTEGER,
        "d_out": INTEGER,
        "projected_side": TEXT,
        "promoted_end": TEXT,
        "frobenius_norm": NUMBER,
        "component_count": INTEGER,
        "relative_error": NUMBER,
    },
    "components": {
        **_MATRIX,
        "position": INTEGER,
        "input_norm": NUMBER,
        "vjp_norm": NUMBER,
        "size": NUMBER,
        "promoted_end": TEXT,
        "predicted_rank": INTEGER,
        "target_ranks": INTEGERS,
        **_PROJECTION,
    },
    "singular_values": {**_MATRIX, "number": INTEGER, "value": NUMBER, "explained": NUMBER}
    | _PROJECTION,
    "neuron_changes": {**_MATRIX, "neuron": INTEGER, "change_norm": NUMBER, "vector": TEXT}
    | _PROJECTION,
    "segments": {
        "segment": TEXT,
        "layer": INTEGER,
        "kind": TEXT,
        "mean_vjp_norm": NUMBER,
        "mean_target_rank": NUMBER,
        "positions": INTEGER,
    },
    "baselines": {"read_position": INTEGER, **_OUTCOME, **_LISTED},
    "effects": {
        "experiment": INTEGER,
        "label": TEXT,
        "layer": INTEGER,
        "position": INTEGER,
        "head": INTEGER,
        "neuron": INTEGER,
        "source_position": INTEGER,
        "read_position": INTEGER,
        **_OUTCOME,
        "probability_effect": NUMBER,
        "logit_effect": NUMBER,
        "logit_difference_effect": NUMBER,
        "kl_nats": NUMBER,
        **_LISTED,
    },
    "edits": {
        "layer": INTEGER,
        "strength": NUMBER,
        "gradient_cosine": NUMBER,
        "probe": INTEGER,
        "label": TEXT,
        "target_token_id": INTEGER,
        "target": TEXT,
        "probability_before": NUMBER,
        "probability_after": NUMBER,
        "log_probability_before": NUMBER,
        "log_probability_after": NUMBER,
        "rank_before": INTEGER,
        "rank_after": INTEGER,
        "predicted_before_token_id": INTEGER,
        "predicted_before": TEXT,
        "predicted_after_token_id": INTEGER,
        "predicted_after": TEXT,
        "kl_bits": NUMBER,
    },
    "texts": {"text": TEXT, "finish_reason": TEXT, "token_count": INTEGER},
    "generated": {
        "step": INTEGER,
        "token_id": INTEGER,
        "token": TEXT,
        "log_probability": NUMBER,
        "entropy_bits": NUMBER,
        "decided": INTEGER,
        **_LISTED,
    },
    "readings": {
        "step": INTEGER,
        "layer": INTEGER,
        "rank": INTEGER,
        "probability": NUMBER,
        "log_probability": NUMBER,
        "top_token_ids": INTEGERS,
        "top_tokens": TEXTS,
    },
    "tensors": {
        "name": TEXT,
        "site": TEXT,
        "layer": INTEGER,
        "positions": INTEGERS,
        "shape": pa.list_(pa.int64()),
        "data_type": TEXT,
        "file": TEXT,
    },
}

SCHEMAS: Mapping[str, pa.Schema] = {
    table: pa.schema(_PROMPT | dict(columns)) for table, columns in COLUMNS.items()
}
