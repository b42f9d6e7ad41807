"""The float64 forward pass of the reference equals that of plain Hugging Face models."""

from __future__ import annotations

import pytest
import torch

from januslens_server.models.adapters import ADAPTERS
from tests.reference.examples import EXAMPLES, LoadExample, prompt
from tests.reference.model import FAMILIES


def test_every_reference_has_an_adapter_and_an_example() -> None:
    examined = {example.config().model_type for example in EXAMPLES.values()}
    assert set(FAMILIES) == examined
    assert examined <= set(ADAPTERS)


@pytest.mark.parametrize("name", EXAMPLES)
def test_reference_equals_the_hugging_face_model(name: str, load_example: LoadExample) -> None:
    loaded, ids = load_example(name), prompt(name, 13)
    with torch.no_grad():
        out = loaded.network(
            input_ids=torch.tensor([ids]),
            output_attentions=True,
            output_hidden_states=True,
            use_cache=False,
        )
    model, passes = loaded.reference, loaded.reference.run(ids)
    logits = model.unembed(model.final_norm(passes[-1].block_output))
    torch.testing.assert_close(out.logits[0].double(), logits, rtol=0, atol=3e-5)
    for layer, passed in enumerate(passes):
        torch.testing.assert_close(
            out.attentions[layer][0].double(), passed.pattern, rtol=0, atol=1e-5
        )
        torch.testing.assert_close(
            out.hidden_states[layer][0].double(), passed.block_input, rtol=1e-5, atol=5e-5
        )


def test_yarn_example_rotates_and_scales(load_example: LoadExample) -> None:
    """In this example M M^T is not the identity, so the transpose is not the inverse."""
    block = load_example("llama_yarn").reference.blocks[0]
    matrix = block.rotation(5, 8)
    product = matrix @ matrix.T
    assert not torch.allclose(product, torch.eye(len(product)).double(), atol=0.1)
