"""How much of an answer a model says by itself: exact memorisation and extraction strength.

Both read one teacher-forced pass and leave the end-of-sequence token out, as OpenUnlearning (arXiv 2506.12618) does: a
model that has learned to stop after a sentence has not memorised the sentence.
"""

from dataclasses import fields, replace

import numpy as np

from fillm.evaluate.answer_tokens import AnswerTokens


def without_end(tokens: AnswerTokens, end_id: int | None) -> AnswerTokens:
    """The answer without its end-of-sequence token; an answer of nothing else keeps it.

    Args:
        tokens: an answer of T tokens.
        end_id: the tokenizer's end-of-sequence token; None if it has none. Only the last token can be the end: an
            answer that lost tokens to `max_length` ends in another and stays whole.

    Returns:
        T or T - 1 tokens, at least one.
    """
    count = len(tokens.token_ids)
    if end_id is None or count < 2 or int(tokens.token_ids[-1]) != end_id:
        return tokens
    columns = {field.name: getattr(tokens, field.name) for field in fields(tokens)}
    return replace(tokens, **{name: None if column is None else column[:-1] for name, column in columns.items()})


def exact_memorisation(tokens: AnswerTokens) -> float:
    """Fraction of answer tokens that the model ranks first, `(1/T) sum_t [argmax p(. | a_<t) = a_t]`.

    Source: Tirumala et al. 2022, arXiv 2205.10770.

    Args:
        tokens: an answer of at least one token.

    Returns:
        0 (none) to 1 (all).
    """
    return float(np.mean(tokens.predicted == tokens.token_ids))


def extraction_strength(tokens: AnswerTokens) -> float:
    """`(T - k)/T`, where `k` is the shortest prefix of the answer after which the model says all the rest.

    Teacher forcing finds the same `k` as greedy decoding: as long as every token is right, both have seen the same.

    Source: Carlini et al. 2021, arXiv 2012.07805, as a fraction of the answer.

    Args:
        tokens: an answer of at least one token.

    Returns:
        1 if the question alone brings forth the answer, 0 if not even the last token follows from all others.
    """
    wrong = tokens.predicted != tokens.token_ids
    prefix = 1 + int(np.flatnonzero(wrong)[-1]) if wrong.any() else 0
    return (len(wrong) - prefix) / len(wrong)
