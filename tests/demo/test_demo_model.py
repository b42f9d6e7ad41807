"""The committed demo model, loaded with plain transformers."""

from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from demo_training.corpus import (
    Prompt,
    documents,
    fact_prompts,
    facts_of,
    indirect_object_prompts,
)
from demo_training.evaluate import RUNNING_EXAMPLES
from demo_training.measurements import DemoModel, failures, predictions
from demo_training.tokenizer import END_OF_TEXT, END_OF_TEXT_ID
from januslens_server.demo import model_path

DEMO = DemoModel.load(model_path())


@pytest.mark.parametrize("example", RUNNING_EXAMPLES, ids=lambda example: example.answer)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_running_examples_work_with_plain_transformers(example: Prompt, dtype: torch.dtype) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    model = AutoModelForCausalLM.from_pretrained(model_path(), dtype=dtype)
    logits = model(**tokenizer(example.text, return_tensors="pt")).logits[0, -1]
    assert tokenizer.decode(logits.argmax()) == f" {example.answer}"


def test_trained_facts_are_known() -> None:
    assert not failures(DEMO, fact_prompts("trained")[::5])


def test_facts_are_known_in_wordings_they_were_not_trained_in() -> None:
    prompts = fact_prompts("held_out")[::2]
    assert len(failures(DEMO, prompts)) <= 0.01 * len(prompts)


def test_indirect_objects_are_found_for_unseen_pairs_of_names() -> None:
    assert not failures(DEMO, indirect_object_prompts(200, seed=0))


def test_an_unknown_subject_gets_an_answer_of_the_relation() -> None:
    prompt = Prompt("The capital of Zqxv is the city of", answer="")
    capitals = {DEMO.answer_id(fact.answer) for fact in facts_of("capital")}
    assert set(predictions(DEMO, [prompt])) <= capitals


def test_prompts_fill_the_whole_context() -> None:
    length = DEMO.model.config.n_positions
    text = " ".join(islice(documents(seed=9), 40))
    tail = DEMO.encode(" The capital of Japan is the city of")
    ids = [*DEMO.encode(text)[: length - len(tail)], *tail]
    logits = DEMO.model(input_ids=torch.tensor([ids])).logits
    assert logits.shape[1] == length
    assert torch.isfinite(logits).all()


def test_weights_are_half_precision_safetensors_of_two_megabytes() -> None:
    with safe_open(model_path() / "model.safetensors", framework="pt") as weights:
        assert {weights.get_tensor(name).dtype for name in weights.keys()} == {torch.float16}  # noqa: SIM118
    assert sum(file.stat().st_size for file in model_path().iterdir()) < 2_200_000


def test_the_folder_holds_an_ordinary_checkpoint_and_its_card() -> None:
    files = {file.name for file in model_path().iterdir()}
    needed = "README.md config.json model.safetensors tokenizer.json tokenizer_config.json"
    assert files >= set(needed.split())


def test_the_input_and_output_embeddings_are_tied() -> None:
    model = DEMO.model
    assert model.lm_head.weight is model.transformer.wte.weight


@settings(derandomize=True, max_examples=200, deadline=None)
@given(st.text())
def test_any_text_round_trips(text: str) -> None:
    assert DEMO.tokenizer.decode(DEMO.encode(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "  two  spaces , and a tab\t\r\n",
        "日本の首都は東京",
        "👩‍👩‍👧 é e\u0301 \x00\x7f\u200b",
        "don't .",
    ],
)
def test_unusual_text_round_trips(text: str) -> None:
    assert DEMO.tokenizer.decode(DEMO.encode(text)) == text


def test_no_special_token_is_added() -> None:
    encoded = DEMO.tokenizer("The capital of Japan")
    assert set(encoded) == {"input_ids", "attention_mask"}
    assert encoded.tokens() == ["The", "Ġcapital", "Ġof", "ĠJapan"]


def test_end_of_text_is_one_id() -> None:
    assert DEMO.encode(END_OF_TEXT) == [END_OF_TEXT_ID]
    assert DEMO.tokenizer.eos_token_id == END_OF_TEXT_ID


def test_every_answer_is_one_token() -> None:
    answers = {prompt.answer for prompt in fact_prompts("held_out")}
    answers |= {prompt.answer for prompt in indirect_object_prompts(1_000, seed=0)}
    assert all(len(DEMO.encode(f" {answer}")) == 1 for answer in answers)


def test_unseen_wordings_use_only_tokens_of_the_corpus() -> None:
    trained = {token for text in islice(documents(seed=3), 10_000) for token in DEMO.encode(text)}
    asked = {token for p in fact_prompts("unseen") for token in DEMO.encode(p.text)}
    assert asked <= trained


def test_the_path_is_found_without_loading_torch(tmp_path: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys; from januslens_server.demo import model_path;"
        "assert model_path().is_dir(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
