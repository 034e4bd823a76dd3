"""What a model still knows and what it kept: the field's metrics, with a reason for every missing figure."""

from fillm.lazy import lazy_names

_HOMES = {
    "AnswerTokens": "answer_tokens",
    "EvaluateConfig": "config",
    "EvaluateResult": "results",
    "Metric": "metric",
    "evaluate_model": "command",
    "greedy_answers": "generate",
    "token_pass": "answer_tokens",
}
__all__ = list(_HOMES)

__getattr__ = lazy_names(__name__, _HOMES)
