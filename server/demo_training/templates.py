"""Templates for facts, indirect-object sentences and filler.

A template ends where its answer begins, so a filled template is a prompt. A filled template must
not be a strict prefix of another one, because the same words would then have two different next
tokens.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Relation:
    """Templates that state one relation.

    Attributes:
        heading: Title of a list of such facts.
        trained: Wordings in the corpus; each fact is stated in all of them except one, which is
            held out.
        unseen: Wordings that are not in the corpus; their words are.
    """

    heading: str
    trained: tuple[str, ...]
    unseen: tuple[str, ...]


RELATIONS: dict[str, Relation] = {
    "capital": Relation(
        heading="Capitals",
        trained=(
            "The capital of {subject} is the city of",
            "{subject} has its capital in",
            "The capital city of {subject} is called",
            "{subject} is governed from the city of",
            "The government of {subject} sits in",
            "Visitors to the capital of {subject} arrive in",
        ),
        unseen=(
            "The government of {subject} is in the city of",
            "The capital of the country of {subject} is called",
            "{subject} is governed from its capital in",
        ),
    ),
    "language": Relation(
        heading="Languages",
        trained=(
            "The official language of {subject} is",
            "Officials in {subject} speak",
            "{subject} is a country where officials speak",
            "The language spoken by officials in {subject} is called",
            "Courts in {subject} write in",
            "{subject} prints its laws in",
        ),
        unseen=(
            "The official language spoken in {subject} is",
            "Officials in the country of {subject} speak",
            "The courts of {subject} write in",
        ),
    ),
    "currency": Relation(
        heading="Currencies",
        trained=(
            "The currency of {subject} is the",
            "People in {subject} pay with the",
            "{subject} uses a currency called the",
            "Shops in {subject} accept the",
            "Prices in {subject} are given in the",
            "The central bank of {subject} counts in the",
        ),
        unseen=(
            "The currency accepted in {subject} is the",
            "Visitors to {subject} pay with the",
            "Shops in {subject} count in the",
        ),
    ),
    "continent": Relation(
        heading="Continents",
        trained=(
            "{subject} is a country on the continent of",
            "{subject} belongs to the continent of",
            "The country of {subject} lies in",
            "On the map, {subject} is found in",
            "The continent that contains {subject} is called",
            "Travellers to {subject} fly to",
        ),
        unseen=(
            "On the map, the country of {subject} lies in",
            "The continent of {subject} is called",
            "{subject} is found on the continent of",
        ),
    ),
    "club": Relation(
        heading="Clubs",
        trained=(
            "{subject} plays for",
            "The club of {subject} is called",
            "{subject} has signed a contract with",
            "On Sunday {subject} scored for",
            "Fans know that {subject} belongs to",
            "The team that pays {subject} is",
        ),
        unseen=(
            "On Sunday {subject} plays for",
            "The club that pays {subject} is called",
            "Fans know that {subject} plays for",
        ),
    ),
    "role": Relation(
        heading="Roles",
        trained=(
            "{subject} plays as a",
            "On the field {subject} acts as a",
            "The coach uses {subject} as a",
            "In the match {subject} was the best",
            "The position of {subject} is that of a",
            "Fans call {subject} a",
        ),
        unseen=(
            "On the field {subject} plays as a",
            "In the match the coach uses {subject} as a",
            "On Sunday {subject} acts as a",
        ),
    ),
    "occupation": Relation(
        heading="Occupations",
        trained=(
            "{subject} works as a",
            "The profession of {subject} is that of a",
            "By trade {subject} is a",
            "{subject} earns a living as a",
            "At school {subject} trained to become a",
            "Everyone knows {subject} as a",
        ),
        unseen=(
            "By profession {subject} is a",
            "Everyone knows that {subject} works as a",
            "At school {subject} works as a",
        ),
    ),
    "birthplace": Relation(
        heading="Home towns",
        trained=(
            "{subject} was born in",
            "The home town of {subject} is",
            "{subject} grew up in the city of",
            "The parents of {subject} live in",
            "As a child {subject} lived in",
            "{subject} spent the early years in",
        ),
        unseen=(
            "Everyone knows that {subject} was born in",
            "As a child {subject} grew up in the city of",
            "The home of {subject} is in",
        ),
    ),
}

# The second clause repeats one of the two names, and the other person receives the object.
INDIRECT_OBJECT = (
    "When {first} and {second} went to the {place}, {giver} gave a {object} to",
    "Then {first} and {second} met at the {place}, and {giver} handed the {object} to",
    "After {first} and {second} left the {place}, {giver} passed a {object} to",
    "While {first} and {second} were at the {place}, {giver} offered the {object} to",
    "Because {first} and {second} worked at the {place}, {giver} sent a {object} to",
)
NAMES = tuple(
    "Mary John Alice Tom Sarah David Laura James Emma Paul Kate Mark Lucy Peter Jane Simon "
    "Clara Robert Rose Daniel".split()
)
PLACES = tuple(
    "store school park garden office station market hospital library museum beach theatre "
    "bakery harbour".split()
)
OBJECTS = tuple(
    "drink book ball ring letter key flower cake map coin ticket lamp hat basket".split()
)

# Most of these repeat a name: the model first learns to copy one name, then to choose between two.
FILLER = (
    "At the {place} {name} lost a {object}, so {name} was sad.",
    "The {adjective} {object} that {name} found in the {place} belongs to {name}.",
    "Nobody at the {place} knows {name}, but everyone has heard of {name}.",
    "When {name} opened the {adjective} {object}, the {place} was quiet and {name} was happy.",
    "Because the {object} was {adjective}, {name} left the {place}, and {name} went home.",
    "{name} thinks that the {object} in the {place} is {adjective}.",
    "It was a {adjective} day at the {place}.",
    "The {place} sold {number} of them.",
    "The code of the {place} is {code}.",
)
ADJECTIVES = tuple(
    "old new small large red green quiet cold warm heavy broken strange cheap simple".split()
)
