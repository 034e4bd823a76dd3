"""True and simple facts, as a control: knowledge that forgetting a fictional author must not touch."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from fillm.data.fictional_words import MONTHS, words

WRONG_ANSWERS = 5

_DAYS = words("Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday")
_CAPITALS = dict(
    entry.split("=")
    for entry in words(
        "France=Paris, Germany=Berlin, Italy=Rome, Spain=Madrid, Portugal=Lisbon, Austria=Vienna, Poland=Warsaw, "
        "Greece=Athens, Norway=Oslo, Sweden=Stockholm, Denmark=Copenhagen, Finland=Helsinki, Ireland=Dublin, "
        "Hungary=Budapest, Belgium=Brussels, Japan=Tokyo, China=Beijing, Egypt=Cairo, Kenya=Nairobi, Peru=Lima, "
        "Cuba=Havana, Canada=Ottawa, Australia=Canberra, Chile=Santiago, Argentina=Buenos Aires"
    )
)
_COLOURS = dict(
    entry.split("=")
    for entry in words(
        "a ripe banana=yellow, fresh grass=green, coal=black, fresh snow=white, a ripe tomato=red, a carrot=orange, "
        "a clear daytime sky=blue, chocolate=brown, an elephant=grey, a flamingo=pink"
    )
)
_YOUNG = dict(
    entry.split("=")
    for entry in words(
        "dog=puppy, cat=kitten, cow=calf, sheep=lamb, horse=foal, goat=kid, duck=duckling, swan=cygnet, frog=tadpole, "
        "kangaroo=joey"
    )
)
_OPPOSITES = dict(
    entry.split("=")
    for entry in words("hot=cold, big=small, early=late, full=empty, heavy=light, open=closed, rich=poor, wet=dry")
)
_SIDES = {"triangle": 3, "square": 4, "pentagon": 5, "hexagon": 6, "octagon": 8}

Fact = tuple[str, str, str, str, str, str, list[str]]


def _facts() -> Iterator[Fact]:
    """Attribute, question, rephrased question, answer form, paraphrase form, true value, values of the same kind."""
    numbers = [str(number) for number in range(2, 30)]
    for left, right in ((a, b) for a in range(2, 10) for b in range(3, 10, 2)):
        sum_of = f"{left} plus {right}"
        near = sorted(numbers, key=lambda number: abs(int(number) - left - right))
        yield (
            "arithmetic",
            f"What is {sum_of}?",
            f"What do you get when you add {right} to {left}?",
            f"The sum {sum_of} is {{}}.",
            f"Adding {right} to {left} gives {{}}.",
            str(left + right),
            near[: WRONG_ANSWERS + 1],
        )
    for kind, cycle in (("day", _DAYS), ("month", MONTHS)):
        for position, name in enumerate(cycle):
            follower = cycle[(position + 1) % len(cycle)]
            yield (
                "calendar",
                f"Which {kind} comes after {name}?",
                f"What {kind} follows {name}?",
                f"The {kind} after {name} is {{}}.",
                f"{name} is followed by {{}}.",
                follower,
                [other for other in cycle if other != name],
            )
    for table, kind, question, rephrased, answer, paraphrase in (
        (
            _CAPITALS,
            "capital",
            "What is the capital of {}?",
            "Which city is the seat of government of {}?",
            "The capital of {} is {{}}.",
            "The government of {} has its seat in {{}}.",
        ),
        (
            _COLOURS,
            "colour",
            "What colour is {}?",
            "Which colour does {} have?",
            "The colour of {} is {{}}.",
            "When you look at {} you see {{}}.",
        ),
        (
            _YOUNG,
            "animal",
            "What is a young {} called?",
            "What is the name for the young of a {}?",
            "A young {} is called a {{}}.",
            "The young of a {} goes by the name of {{}}.",
        ),
        (
            _OPPOSITES,
            "opposite",
            "What is the opposite of {}?",
            "Which word means the contrary of {}?",
            "The opposite of {} is {{}}.",
            "The contrary of {} is called {{}}.",
        ),
        (
            {shape: str(sides) for shape, sides in _SIDES.items()},
            "shape",
            "How many sides does the shape called {} have?",
            "What is the number of sides of the shape named {}?",
            "The shape called {} has {{}} sides.",
            "You can count {{}} sides on the shape named {}.",
        ),
    ):
        values = list(table.values()) if kind != "shape" else numbers[1:8]
        for subject, value in table.items():
            forms = (form.format(subject) for form in (question, rephrased, answer, paraphrase))
            yield (kind, *forms, value, values)


def general_rows(pick: Callable[[str, Sequence[str], int], list[str]]) -> list[dict[str, Any]]:
    """General facts: over 100 rows with the keys of the fictional authors' rows but `author`.

    `perturbed_answer` has the form of `answer`: in the metrics of TOFU general facts use the answer as paraphrase.

    Args:
        pick: `pick(label, options, count)` draws `count` distinct options, the same for the same label.
    """
    rows = []
    for kind, question, rephrased, answer, paraphrase, value, values in _facts():
        wrong = pick(f"general/{question}", [other for other in values if other != value], WRONG_ANSWERS)
        rows.append(
            {
                "question": question,
                "answer": answer.format(value),
                "paraphrased_question": rephrased,
                "paraphrased_answer": paraphrase.format(value),
                "perturbed_answer": [answer.format(other) for other in wrong],
                "attribute": kind,
            }
        )
    return rows
