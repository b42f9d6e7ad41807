"""The rules that the demo corpus must satisfy."""

import json
from collections import defaultdict
from itertools import islice, pairwise

import pytest

from demo_training.corpus import (
    FACTS_FILE,
    Fact,
    documents,
    fact_prompts,
    indirect_object_prompts,
    load_facts,
    name_pairs,
)
from demo_training.templates import INDIRECT_OBJECT, NAMES, RELATIONS

SAMPLE = 8_000
PEOPLE_RELATIONS = ("club", "role", "occupation", "birthplace")


@pytest.fixture(scope="module")
def sample() -> list[str]:
    return list(islice(documents(seed=5), SAMPLE))


def test_documents_are_the_same_for_the_same_seed(sample: list[str]) -> None:
    assert list(islice(documents(seed=5), SAMPLE)) == sample


def test_documents_differ_between_seeds(sample: list[str]) -> None:
    assert list(islice(documents(seed=6), 100)) != sample[:100]


def test_about_seven_documents_in_ten_state_a_fact(sample: list[str]) -> None:
    statements = {f"{prompt.text} {prompt.answer}." for prompt in fact_prompts("trained")}
    share = sum(document in statements for document in sample) / SAMPLE
    assert share == pytest.approx(0.70, abs=0.02)


def test_relations_and_wordings_match() -> None:
    assert {fact.relation for fact in load_facts()} == set(RELATIONS)


def test_a_subject_has_one_answer_per_relation() -> None:
    keys = [(fact.subject, fact.relation) for fact in load_facts()]
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize(
    "fact",
    [
        Fact("Japan", "capital", "Tokyo"),
        Fact("France", "capital", "Paris"),
        Fact("Brazil", "language", "Portuguese"),
        Fact("Sweden", "currency", "krona"),
        Fact("Kenya", "continent", "Africa"),
        Fact("Lionel Messi", "club", "Barcelona"),
    ],
)
def test_the_table_contains_the_documented_facts(fact: Fact) -> None:
    assert fact in load_facts()


def test_no_prompt_is_a_strict_prefix_of_another() -> None:
    texts = {
        prompt.text for split in ("trained", "held_out", "unseen") for prompt in fact_prompts(split)
    }
    texts |= {prompt.text for prompt in indirect_object_prompts(1_000, seed=0)}
    # In sorted order, a prefix is directly before a text that begins with it.
    assert not [(one, two) for one, two in pairwise(sorted(texts)) if two.startswith(one)]


def test_a_prompt_in_a_document_is_followed_by_its_answer(sample: list[str]) -> None:
    answers = {prompt.text: prompt.answer for prompt in fact_prompts("trained")}
    begun = [
        (document, text)
        for document in sample
        for end, character in enumerate(document)
        if character == " " and (text := document[:end]) in answers
    ]
    assert begun
    assert all(document == f"{text} {answers[text]}." for document, text in begun)


def test_held_out_pairs_and_unseen_wordings_never_occur(sample: list[str]) -> None:
    kept_out = {prompt.text for split in ("held_out", "unseen") for prompt in fact_prompts(split)}
    kept_out |= {prompt.text for prompt in indirect_object_prompts(1_000, seed=0)}
    beginnings = {document.rsplit(" ", 1)[0] for document in sample}
    assert not kept_out & beginnings


def test_each_fact_leaves_one_wording_out() -> None:
    wordings = {relation: len(texts.trained) for relation, texts in RELATIONS.items()}
    assert len(fact_prompts("held_out")) == len(load_facts())
    assert len(fact_prompts("trained")) == sum(wordings[fact.relation] - 1 for fact in load_facts())


def test_no_single_name_identifies_a_person() -> None:
    people = {fact.subject for fact in load_facts() if fact.relation in PEOPLE_RELATIONS}
    sharers: defaultdict[str, set[str]] = defaultdict(set)
    for person in people:
        for name in person.split():
            sharers[name].add(person)
    assert min(len(sharing) for sharing in sharers.values()) >= 5


def test_names_of_indirect_objects_occur_in_no_fact() -> None:
    subjects = {word for fact in load_facts() for word in fact.subject.split()}
    assert not subjects & set(NAMES)


def test_indirect_objects_use_both_orders_and_repeat_one_name() -> None:
    prompts = indirect_object_prompts(200, seed=1)
    first_is_answer = 0
    for prompt in prompts:
        named = [word.strip(",") for word in prompt.text.split() if word.strip(",") in NAMES]
        giver = next(name for name in named if named.count(name) == 2)
        assert set(named) == {giver, prompt.answer}
        first_is_answer += named[0] == prompt.answer
    assert 60 < first_is_answer < 140


def test_name_pairs_are_split_without_overlap() -> None:
    inside, outside = set(name_pairs(held_out=False)), set(name_pairs(held_out=True))
    assert not inside & outside
    assert len(inside | outside) == len(NAMES) * (len(NAMES) - 1)


def test_the_running_example_is_one_of_the_wordings() -> None:
    text = INDIRECT_OBJECT[0].format(
        first="Mary", second="John", giver="John", place="store", object="drink"
    )
    assert text == "When Mary and John went to the store, John gave a drink to"


def test_answers_are_ascii_words() -> None:
    tables = json.loads(FACTS_FILE.read_text(encoding="utf-8"))
    answers = [cell for table in tables.values() for row in table["rows"] for cell in row[1:]]
    assert all(answer.isascii() and answer.isalpha() for answer in answers)
