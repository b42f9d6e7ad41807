"""Run docs/serving-engines.md on responses in the documented formats of serving engines.

The responses hold the ids and log-probabilities of a generation of the embedded model.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import januslens

PAGE = Path(__file__).parents[2] / "docs" / "serving-engines.md"
EXAMPLE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
PROMPT = "The capital of Japan is the city of"


def vllm(prompt: list[int], answer: januslens.Generation) -> Any:
    """A response of /v1/chat/completions with `logprobs` and `return_token_ids`."""
    content = [
        {
            "token": made.token.text,
            "logprob": made.log_probability,
            "bytes": list(made.token.raw),
            "top_logprobs": [],
        }
        for made in answer
    ]
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": answer.text},
        "logprobs": {"content": content},
        "finish_reason": "stop",
        "token_ids": [made.token.id for made in answer],
    }
    return {"object": "chat.completion", "choices": [choice], "prompt_token_ids": prompt}


def sglang(prompt: list[int], answer: januslens.Generation) -> Any:
    """A request to /generate with `return_logprob`, and its response."""
    scored = [[made.log_probability, made.token.id, None] for made in answer]
    meta = {"output_token_logprobs": scored, "completion_tokens": len(answer)}
    request = {"input_ids": prompt, "return_logprob": True}
    ids = [made.token.id for made in answer]
    return [request, {"text": answer.text, "output_ids": ids, "meta_info": meta}]


def tgi(prompt: list[int], answer: januslens.Generation) -> Any:
    """A response of /generate with `details` and `decoder_input_details`."""
    prefill = [{"id": i, "text": "", "logprob": None} for i in prompt]
    tokens = [
        {
            "id": made.token.id,
            "text": made.token.text,
            "logprob": made.log_probability,
            "special": made.token.text.startswith("<|"),
        }
        for made in answer
    ]
    details = {
        "finish_reason": "eos_token",
        "generated_tokens": len(answer),
        "prefill": prefill,
        "tokens": tokens,
    }
    return {"generated_text": answer.text, "details": details}


def test_page_explains_recorded_responses(
    server_address: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with januslens.Client(server_address) as client:
        answer = client.generate(PROMPT)
    monkeypatch.chdir(tmp_path)
    for record in (vllm, sglang, tgi):
        recorded = record(answer.ids_before(0), answer)
        Path(f"{record.__name__}.json").write_text(json.dumps(recorded))
    names: dict[str, Any] = {"__name__": "page"}
    examples = EXAMPLE.findall(PAGE.read_text())
    assert len(examples) == 5
    for example in examples[:-1]:
        code = compile(example.replace("127.0.0.1:50051", server_address), PAGE.name, "exec")
        exec(code, names)  # noqa: S102 - our own documentation
    found = names["found"]
    assert found.trace.target().target == answer.tokens[0].token
    assert found.largest_difference < 1e-3
    assert capsys.readouterr().out.splitlines() == ["␣Tokyo differs by at most 0.0 nats"] * 3
    exec(compile(examples[-1], PAGE.name, "exec"), names)  # noqa: S102 - our own documentation
    assert names["found"].trace.target().target == answer.tokens[0].token
    names["client"].close()
