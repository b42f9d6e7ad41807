"""The figures in suite.json are those of plain Hugging Face, computed without the server's code."""

from __future__ import annotations

import base64
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

MODEL = Path(__file__).parents[2] / "server" / "januslens_server" / "demo" / "model"
SUITE = Path(__file__).with_name("suite.json")
TOKYO, PARIS = " Tokyo", " Paris"


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def checks() -> dict[str, dict[str, Any]]:
    return {check["name"]: check for check in json.loads(SUITE.read_text())["checks"]}


@pytest.fixture(scope="module")
def ids() -> Tensor:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    ids: Tensor = tokenizer("The capital of Japan is the city of", return_tensors="pt").input_ids
    return ids


def token(text: str) -> int:
    (number,) = AutoTokenizer.from_pretrained(MODEL)(text).input_ids
    return int(number)


def last_logits(model: Any, ids: Tensor) -> Tensor:
    """Return the logits of the next token, [vocab]."""
    logits: Tensor = model(ids).logits[0, -1]
    return logits


def near(figure: float, expected: Any) -> bool:
    return bool(abs(figure - expected["near"]) <= expected["within"])


@torch.no_grad()
def test_trace(model: Any, ids: Tensor, checks: dict[str, dict[str, Any]]) -> None:
    logits = last_logits(model, ids)
    expected = checks["Trace streams a header, the layers and a summary"]["expect"]
    header = "messages.0.header.targets.0"
    assert int(logits.argmax()) == expected[f"{header}.target_token_id"] == token(TOKYO)
    assert near(float(logits.max()), expected[f"{header}.target_logit"])
    assert near(float(logits.softmax(0).max()), expected[f"{header}.target_probability"])
    expected = checks["a requested target without lists of tokens"]["expect"]
    paris = token(PARIS)
    assert expected[f"{header}.target_token_id"] == paris
    assert int((logits > logits[paris]).sum()) == expected[f"{header}.target_rank"]
    log_probability = float(logits.log_softmax(0)[paris])
    assert near(log_probability, expected[f"{header}.target_log_probability"])


@torch.no_grad()
def test_named_source(ids: Tensor, checks: dict[str, dict[str, Any]]) -> None:
    check = checks["a named source of a head is the only one"]
    (named,) = check["request"]["selection"]["only_sources"]
    layer, head, source = named["layer"], named["head"], named["position"]
    model = AutoModelForCausalLM.from_pretrained(
        MODEL, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    found = model(ids, output_attentions=True, output_hidden_states=True)
    block = model.transformer.h[layer]
    width = model.config.n_embd // model.config.n_head
    mapped = block.attn.c_attn(block.ln_1(found.hidden_states[layer][0]))
    values = mapped[:, -model.config.n_embd :][:, head * width : (head + 1) * width]
    results = values @ block.attn.c_proj.weight[head * width : (head + 1) * width]
    attention = found.attentions[layer][0, head, -1]
    whole = attention @ results
    share = attention[source] * results[source] @ whole / whole.square().sum()
    for name, figure in (
        ("nodes.1.norm", results[source].norm()),
        ("edges.0.attention", attention[source]),
        ("edges.0.share", share),
    ):
        assert near(float(figure), check["expect"][f"messages.1.layer.{name}"]), figure


def test_gradients_and_edit(model: Any, ids: Tensor, checks: dict[str, dict[str, Any]]) -> None:
    paris = token(PARIS)
    loss = -last_logits(model, ids).log_softmax(0)[paris]
    matrices = [model.transformer.h[layer].mlp.c_proj.weight for layer in (3, 2)]
    gradients = torch.autograd.grad(loss, matrices)
    loss = loss.detach()
    expected = checks["GradientLens streams matrices from the last layer down"]["expect"]
    assert near(float(loss), expected["messages.0.header.loss"])
    for number, gradient in enumerate(gradients, start=1):
        norm = float(gradient.norm())
        assert near(norm, expected[f"messages.{number}.matrix.frobenius_norm"])

    check = checks["PreviewEdit reports the prediction before and after"]
    rate = check["request"]["descent"]["learning_rate"]
    original = matrices[0].data
    try:
        matrices[0].data = original - rate * gradients[0]
        with torch.no_grad():
            after = last_logits(model, ids).log_softmax(0)
    finally:
        matrices[0].data = original
    edited = {name.removeprefix("messages.0.edited."): at for name, at in check["expect"].items()}
    assert near(-float(loss), edited["log_probability_before"])
    assert near(float(after[paris]), edited["log_probability_after"])
    assert int(after.argmax()) == edited["predicted_after"]


@torch.no_grad()
def test_intervention(model: Any, ids: Tensor, checks: dict[str, dict[str, Any]]) -> None:
    check = checks["Intervene reports the prediction without an MLP"]
    ((layer,),) = (
        intervention["layers"]
        for experiment in check["request"]["experiments"]
        for intervention in experiment["interventions"]
    )
    before = last_logits(model, ids).log_softmax(0)
    handle = model.transformer.h[layer].mlp.register_forward_hook(lambda *args: 0 * args[2])
    try:
        after = last_logits(model, ids).log_softmax(0)
    finally:
        handle.remove()
    outcome = "messages.1.effect.after.0"
    assert near(float(after[token(TOKYO)].exp()), check["expect"][f"{outcome}.target_probability"])
    divergence = float((before.exp() * (before - after)).sum())
    assert near(divergence, check["expect"][f"{outcome}.kl_nats"])


@torch.no_grad()
def test_generation(model: Any, ids: Tensor, checks: dict[str, dict[str, Any]]) -> None:
    continued = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    expected = checks["Generate continues greedily until the end"]["expect"]
    texts = AutoTokenizer.from_pretrained(MODEL).convert_ids_to_tokens(continued[0, ids.shape[1] :])
    assert [text.replace("Ġ", " ") for text in texts] == expected["messages.*.generated.token.text"]


@torch.no_grad()
def test_projection(model: Any, checks: dict[str, dict[str, Any]]) -> None:
    check = checks["Project reads a vector in the vocabulary"]
    vector = np.frombuffer(base64.b64decode(check["request"]["vectors"]["data"]), "<f4").copy()
    read = model.lm_head(model.transformer.ln_f(torch.from_numpy(vector))).log_softmax(0)
    projection = "messages.0.projections.0"
    assert int(read.argmax()) == check["expect"][f"{projection}.top_token_ids"][0]
    assert int(read.argmin()) == check["expect"][f"{projection}.bottom_token_ids"][0]
    top = math.exp(float(read.max()))
    assert near(top, check["expect"][f"{projection}.top_probabilities.0"])


@torch.no_grad()
def test_neurons(model: Any, checks: dict[str, dict[str, Any]]) -> None:
    first = checks["FindNeurons returns a first page"]["expect"]
    block = model.transformer.h[first["messages.0.neurons.0.layer"]]
    value = block.mlp.c_proj.weight[first["messages.0.neurons.0.neuron"]]
    logits = model.lm_head(model.transformer.ln_f(value))
    rank = int((logits > logits[token(TOKYO)]).sum())
    assert rank == first["messages.0.neurons.0.rank"]
