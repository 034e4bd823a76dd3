"""ROUGE-L recall (Lin 2004, aclanthology.org/W04-1013), as the package rouge-score computes it."""

from collections.abc import Sequence


def rouge_l_recalls(references: Sequence[str], answers: Sequence[str]) -> list[float]:
    """Length of the longest common subsequence of stemmed words, over the words of the reference.

    Args:
        references: the true answers.
        answers: what a model said, one each.

    Returns:
        One number in 0..1 each; 0 where the reference has no word (no letter of the Latin alphabet and no digit).
    """
    from rouge_score import rouge_scorer  # an extra; `Metric.packages` has seen to it that it is there

    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    pairs = zip(references, answers, strict=True)
    return [float(scorer.score(reference, answer)["rougeL"].recall) for reference, answer in pairs]
