"""The server's numbers on published weights, against plain transformers and autograd."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from januslens_server.errors import never_cancelled
from januslens_server.models.chat import ChatTemplate
from januslens_server.models.loader import ModelSource, load
from januslens_server.models.resident import ResidentModel
from januslens_server.models.tokenizer import Vocabulary
from januslens_server.pipelines.generate import generate
from januslens_server.pipelines.resolve import resolve_generate, resolve_trace
from januslens_server.pipelines.self_check import self_check
from januslens_server.pipelines.trace import trace
from januslens_server.results import (
    GeneratedToken,
    LayerGraph,
    MatrixKind,
    NodeKind,
    TraceHeader,
    TraceSummary,
)
from januslens_server.specs import (
    Chat,
    ChatMessage,
    GenerateSpec,
    GradientLensSpec,
    LensSpec,
    NegativeLogLikelihood,
    Sampling,
    TraceSpec,
)
from tests.real.checkpoints import GEMMA, SMOLLM
from tests.reference.gradients import log_probabilities, run_gradient

pytestmark = pytest.mark.real

EIFFEL = "The Eiffel Tower is located in the city of"
PROMPTS = [
    EIFFEL,
    "Lionel Messi plays for",
    "In 2023 the price rose by 14.5% to 1,200 dollars, because",
    "def add(a, b):\n    return",
    "Grüße aus München 👋🏽, היום",
]
TOP = 5
GREEDY = Sampling()
LENS = 1e-4  # of the largest logit
GRADIENTS = 5e-4  # float32 passes of these models differ as much between attention kernels


@dataclass(frozen=True)
class Published:
    """A published checkpoint, as the server holds it and as plain transformers loads it."""

    folder: Path
    resident: ResidentModel
    plain: Any

    def ids(self, text: str) -> list[int]:
        return list(AutoTokenizer.from_pretrained(self.folder)(text).input_ids)


@pytest.fixture(scope="module", params=[SMOLLM, GEMMA], ids=lambda folder: folder.name)
def published(request: pytest.FixtureRequest) -> Published:
    folder: Path = request.param
    plain = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return Published(folder, load(ModelSource(folder.name, str(folder))), plain.eval())


# The format is that of the model's published template.
GEMMA_TURNS = """{{ bos_token }}{% for message in messages -%}
{% set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
{{ '<start_of_turn>' + role + '\n' + (message['content'] | trim) + '<end_of_turn>\n' }}
{%- endfor -%}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""
SAID = ["Where is the Eiffel Tower?", "In Paris.\n\n", "  Grüße 👋🏽, `x < y` \n and היום?"]


@pytest.mark.parametrize("continues", [False, True])
def test_conversations_have_the_ids_of_transformers(published: Published, continues: bool) -> None:
    tokenizer = AutoTokenizer.from_pretrained(published.folder)
    vocabulary = published.resident.vocabulary
    if tokenizer.chat_template is None:
        tokenizer.chat_template = GEMMA_TURNS
        template = ChatTemplate(GEMMA_TURNS, {"bos_token": tokenizer.bos_token})
        vocabulary = Vocabulary(tokenizer.backend_tokenizer, chat=template)
    said = [
        {"role": ("user", "assistant")[i % 2], "content": content}
        for i, content in enumerate(SAID[:2] if continues else SAID)
    ]
    ids = tokenizer.apply_chat_template(
        said,
        add_generation_prompt=not continues,
        continue_final_message=continues,
        return_dict=False,
    )
    chat = Chat(tuple(ChatMessage(**message) for message in said), continues)
    tokens = vocabulary.encode_chat(chat)
    assert [token.id for token in tokens] == ids
    control = {i for i, t in tokenizer.added_tokens_decoder.items() if t.content.strip()}
    markup = "".join(tokenizer.convert_ids_to_tokens([i for i in ids if i in control]))
    spelled = Chat((ChatMessage("user", markup),))
    inside = [token for token in vocabulary.encode_chat(spelled) if token.message == 0]
    assert b"".join(token.raw for token in inside).decode() == markup
    assert not {token.id for token in inside} & control


def test_self_check_holds(published: Published) -> None:
    assert all(guarantee.held for guarantee in self_check(published.resident))


@pytest.mark.parametrize("text", PROMPTS)
def test_residual_stream_equals_the_hidden_states_of_transformers(
    published: Published, text: str
) -> None:
    ids = published.ids(text)
    spec = TraceSpec(
        text,
        lens=LensSpec(top_k=TOP, bottom_k=0),
        node_kinds=frozenset({NodeKind.BLOCK_OUTPUT, NodeKind.PREDICTION}),
    )
    header, *graphs, summary = trace(resolve_trace(published.resident, spec), lambda: None)
    assert isinstance(header, TraceHeader)
    assert isinstance(summary, TraceSummary)
    assert [token.id for token in header.prompt_tokens] == ids
    with torch.inference_mode():
        passed = published.plain(torch.tensor([ids]), output_hidden_states=True)
        # The last hidden state is after the final norm, the others are not.
        norm, head = published.plain.model.norm, published.plain.lm_head
        states = [norm(state[0, -1]) for state in passed.hidden_states[1:-1]]
        expected = [head(state) for state in (*states, passed.hidden_states[-1][0, -1])]
    blocks = [graph for graph in graphs if isinstance(graph, LayerGraph) and graph.nodes]
    for graph, logits in zip(blocks, expected, strict=False):
        row = graph.rows[0]
        top = logits.topk(TOP)
        assert graph.projections.top_ids[row].tolist() == top.indices.tolist()
        difference = torch.from_numpy(graph.projections.top_logits[row]) - top.values
        assert float(difference.abs().max()) < LENS * float(logits.abs().max())
    assert header.targets[0].predicted_token_id == int(passed.logits[0, -1].argmax())


def test_contributions_of_all_parts_add_up_to_the_logit(published: Published) -> None:
    spec = TraceSpec(EIFFEL, include_logit_contribution=True, include_checks=True)
    *_, summary = trace(resolve_trace(published.resident, spec), lambda: None)
    assert isinstance(summary, TraceSummary)
    assert summary.checks
    assert all(check.held for check in summary.checks)


@pytest.mark.parametrize("kind", [MatrixKind.GATE, MatrixKind.FF2])
def test_factors_multiply_to_the_gradients_of_autograd(
    published: Published, kind: MatrixKind
) -> None:
    ids, target = published.ids(EIFFEL), published.ids(" Paris")[-1]
    spec = GradientLensSpec(
        tuple(ids),
        NegativeLogLikelihood((target,)),
        matrices=(kind,),
        lens=LensSpec(top_k=1, bottom_k=0),
        components=0,
        include_factors=True,
    )
    found = run_gradient(published.resident, spec)
    published.plain.zero_grad()
    (-log_probabilities(published.plain, ids)[target]).backward()
    name = {MatrixKind.GATE: "gate_proj", MatrixKind.FF2: "down_proj"}[kind]
    for layer, block in enumerate(published.plain.model.layers):
        expected = getattr(block.mlp, name).weight.grad.double().T
        error = (found.outer_products((layer, kind)) - expected).norm() / expected.norm()
        assert float(error) < GRADIENTS, layer
    published.plain.zero_grad()


def test_smollm2_predicts_the_city_of_the_eiffel_tower() -> None:
    """The fact enters the last position's residual stream in the upper layers only."""
    model = load(ModelSource("smollm2", str(SMOLLM)))
    spec = TraceSpec(
        EIFFEL, target=" Paris", node_kinds=frozenset({NodeKind.BLOCK_OUTPUT}), lens=LensSpec(5, 0)
    )
    *graphs, _ = (event for event in trace(resolve_trace(model, spec), lambda: None))
    blocks = [graph for graph in graphs if isinstance(graph, LayerGraph) and graph.nodes]
    ranks = [int(graph.projections.target_ranks[graph.rows[0], 0]) for graph in blocks]
    layers = len(ranks)
    assert min(ranks[: layers // 2]) > 100
    assert ranks[-1] == 0
    probability = float(blocks[-1].projections.target_probabilities[blocks[-1].rows[0], 0])
    assert math.isclose(probability, 0.702, abs_tol=0.005)


def test_greedy_ids_equal_those_of_transformers(published: Published) -> None:
    for text in (EIFFEL, PROMPTS[3]):
        ids = published.ids(text)
        batch = torch.tensor([ids])
        with torch.inference_mode():
            said = published.plain.generate(
                batch, attention_mask=torch.ones_like(batch), max_new_tokens=24, do_sample=False
            )
        assert generated(published, ids, 24) == said[0, len(ids) :].tolist(), text


def test_draws_repeat_with_the_seed(published: Published) -> None:
    ids = published.ids(EIFFEL)
    first, again, other = (
        generated(published, ids, 12, Sampling(1.5, seed=seed)) for seed in (5, 5, 6)
    )
    assert first == again != other


def generated(
    published: Published, ids: list[int], new: int, sampling: Sampling = GREEDY
) -> list[int]:
    spec = GenerateSpec(tuple(ids), new, sampling)
    events = generate(resolve_generate(published.resident, spec), never_cancelled)
    return [event.token.id for event in events if isinstance(event, GeneratedToken)]
