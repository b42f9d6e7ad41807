"""The contribution tree on a published checkpoint, against contributions from plain hooks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from januslens import Trace
from januslens.assemblers import TraceAssembler
from januslens.v1 import trace_pb2
from januslens_server.models.loader import ModelSource, load
from januslens_server.pipelines.resolve import resolve_trace
from januslens_server.pipelines.trace import trace
from januslens_server.rpc.encode.trace import TraceEncoder
from januslens_server.specs import LensSpec, TraceSpec
from tests.real.checkpoints import SMOLLM

pytestmark = pytest.mark.real

EIFFEL = "The Eiffel Tower is located in the city of"
PARIS = " Paris"


def traced() -> Trace:
    resident = load(ModelSource("smollm2", str(SMOLLM)))
    spec = TraceSpec(EIFFEL, include_logit_contribution=True, lens=LensSpec(top_k=1, bottom_k=1))
    encoder = TraceEncoder("r1", resident.vocabulary.token)
    assembler = TraceAssembler()
    for event in trace(resolve_trace(resident, spec), lambda: None):
        for response in encoder.encode(event) if event else ():
            assembler.feed(trace_pb2.TraceResponse.FromString(response))
    return assembler.result()


@torch.inference_mode()
def contributions_of_heads() -> torch.Tensor:
    """Return what every head adds to the logit of " Paris" directly, `[layers, heads]`."""
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM)
    model: Any = AutoModelForCausalLM.from_pretrained(SMOLLM, dtype=torch.float32).eval()
    results: list[torch.Tensor] = []  # the input of W_O at the last position
    for block in model.model.layers:
        block.self_attn.o_proj.register_forward_pre_hook(
            lambda _module, arguments: results.append(arguments[0][0, -1])
        )
    last: list[torch.Tensor] = []
    model.model.norm.register_forward_pre_hook(lambda _m, arguments: last.append(arguments[0]))
    passed = model(**tokenizer(EIFFEL, return_tensors="pt"))
    rms = (last[0][0, -1].square().mean() + model.model.norm.variance_epsilon).sqrt()
    paris = tokenizer(PARIS).input_ids[-1]
    assert passed.logits[0, -1].argmax() == paris
    direction = model.lm_head.weight[paris] * model.model.norm.weight / rms
    heads = model.config.num_attention_heads
    rows = []
    for block, result in zip(model.model.layers, results, strict=True):
        pulled = direction @ block.self_attn.o_proj.weight  # [heads * d_head]
        rows.append((pulled * result).unflatten(0, (heads, -1)).sum(-1))
    return torch.stack(rows)


def test_tree_of_a_fact_names_the_heads_that_bring_it() -> None:
    found = traced()
    tree = found.why()
    heads = contributions_of_heads()
    for _, part in tree.lines():
        node = part.node
        if node.kind == "HEAD_OUTPUT" and node.layer is not None and node.head is not None:
            expected = float(heads[node.layer, node.head])
            assert part.contribution == pytest.approx(expected, abs=2e-3)
    # Attention of layer 23 moves what is known about "iffel" to the last position.
    assert tree.parts[0].node.id == "L23/p9/ATTENTION_OUTPUT"
    reader = tree.find("L23/p9/HEAD_OUTPUT/h4")
    source = found.prompt_tokens[reader.parts[0].node.source_position or 0]
    assert source.text == "iffel"
    # Head 1 of layer 29 is listed although head 0 of the same layer cancels it.
    assert tree.find("L29/p9/HEAD_OUTPUT/h1").contribution > 2.5
    assert abs(tree.find("L29/p9/ATTENTION_OUTPUT").contribution) < 0.5
