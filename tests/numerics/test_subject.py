"""Subjects are found by the characters of the prompt, for every kind of tokenizer."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tokenizers import Regex, normalizers

from januslens_server.errors import InvalidRequest
from januslens_server.lens.backward_lens import Segment
from januslens_server.models.resident import ResidentModel
from januslens_server.models.tokenizer import Vocabulary
from januslens_server.pipelines.inputs import read_objective, read_segments
from januslens_server.specs import GradientLensSpec, NegativeLogLikelihood
from tests.architectures.cases import CASES
from tests.architectures.tiny_models import resident
from tests.loading.tokenizers_of import byte_level

NORMALIZERS = {
    "NFC": normalizers.NFC(),
    "NFKC": normalizers.NFKC(),
    "lower case": normalizers.Lowercase(),
    "collapsed spaces": normalizers.Replace(Regex(" +"), " "),
    "prefix": normalizers.Prepend(" "),
    "none": None,
}


def model_with(normalizer: normalizers.Normalizer | None) -> ResidentModel:
    tokenizer = byte_level(False, ["a"])
    tokenizer.normalizer = normalizer
    model = resident(next(case for case in CASES if case.id == "gpt2-plain"))
    facts = replace(model.view.facts, vocab_size=10**6, max_positions=200)
    vocabulary = Vocabulary(tokenizer)
    return replace(model, vocabulary=vocabulary, view=replace(model.view, facts=facts))


@pytest.mark.parametrize("name", NORMALIZERS)
@pytest.mark.parametrize(
    ("before", "subject", "after"),
    [
        ("I met ", "Zu\u0308rich Bahnhof", " in May"),  # decomposed, composed by NFC
        ("The ", "\ufb01nal \u2460", " round"),  # a ligature and a circled digit, changed by NFKC
        ("The capital of ", "JAPAN", " is"),
        ("Two   spaces   before  ", "New   York", "   City"),
    ],
)
def test_a_subject_is_found_by_the_prompts_characters(
    name: str, before: str, subject: str, after: str
) -> None:
    model = model_with(NORMALIZERS[name])
    prompt = before + subject + after
    objective = read_objective(model, GradientLensSpec(prompt, NegativeLogLikelihood((5,))))
    segments = read_segments(subject, prompt, objective)
    touched = [*segments.get(Segment.SUBJECT, []), *segments[Segment.LAST_SUBJECT]]
    characters = {
        i
        for position in touched
        for token in [objective.tokens[position]]
        for i in range(token.start or 0, token.end or 0)
    }
    read = {i for i in characters if prompt[i] != " "}
    start, end = len(before), len(before) + len(subject)
    assert (min(read), max(read)) == (start, end - 1)


def test_the_last_occurrence_counts() -> None:
    model = model_with(None)
    objective = read_objective(model, GradientLensSpec("ab ab c", NegativeLogLikelihood((5,))))
    segments = read_segments("ab", "ab ab c", objective)
    assert segments[Segment.LAST_SUBJECT] == [4]


@pytest.mark.parametrize("as_ids", [False, True])
@pytest.mark.parametrize(
    ("prompt", "subject", "start"),
    [
        ("He is in this", " is", 3),  # and not the end of "this"
        ("He is in this", "is", 11),
        ("He is in this", "is ", 3),
        ("He is in this", "  is", 11),  # does not occur with two spaces
        ("banana", "ana", 3),
        ("banana", "banana", 0),
        ("\u00df \u0130 \u00df", "\u00df", 4),
        ("a\u00a0b a b", "b\u00a0", 6),  # neither bytes nor spaces of another character
        ("\u0130stanbul i", "\u0130stanbul", 0),
        ("\U0001f469\u200d\U0001f467 \U0001f469", "\U0001f469\u200d\U0001f467", 0),
    ],
)
def test_outer_spaces_of_a_subject_choose_its_occurrence(
    prompt: str, subject: str, start: int, as_ids: bool
) -> None:
    model = model_with(None)
    tokens = model.vocabulary.encode_prompt(prompt)
    given = tuple(token.id for token in tokens) if as_ids else prompt
    objective = read_objective(model, GradientLensSpec(given, NegativeLogLikelihood((5,))))
    found = read_segments(subject, given, objective)
    end = start + len(subject.strip())
    expected = [i for i, t in enumerate(tokens) if (t.start or 0) < end and (t.end or 0) > start]
    last = len(tokens) - 1  # a segment of its own
    touched = [*found.get(Segment.SUBJECT, []), *found.get(Segment.LAST_SUBJECT, [])]
    assert [i for i in touched if i != last] == [i for i in expected if i != last]


def test_a_subject_in_token_ids_is_found_by_their_bytes() -> None:
    model = model_with(normalizers.NFC())
    ids = tuple(token.id for token in model.vocabulary.encode_prompt("the Eiffel Tower is"))
    objective = read_objective(model, GradientLensSpec(ids, NegativeLogLikelihood((5,))))
    segments = read_segments("Eiffel", ids, objective)
    assert segments[Segment.LAST_SUBJECT] == [9]


def test_a_subject_that_is_not_in_the_prompt_is_refused() -> None:
    model = model_with(normalizers.Lowercase())
    objective = read_objective(model, GradientLensSpec("The JAPAN", NegativeLogLikelihood((5,))))
    for missing in ("japan", "Peru", " "):
        with pytest.raises(InvalidRequest, match="does not occur in the prompt"):
            read_segments(missing, "The JAPAN", objective)
