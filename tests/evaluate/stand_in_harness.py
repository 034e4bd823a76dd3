"""As much of lm-evaluation-harness as `--lm-eval` uses, written to a folder for processes of their own to import.

Its one task asks for all three kinds of answers about texts of several lengths, and for some that are drawn at random.
The answers are cheap functions of the texts and of what was drawn; with HARNESS_BREAKS in the environment one of them
is an error.
"""

from pathlib import Path

_PACKAGE = """
import os
import random
from types import SimpleNamespace
TEXTS = [("word " * (1 + number % 5) + str(number), str(number % 7)) for number in range(23)]

def simple_evaluate(model, tasks, log_samples, **seeds):
    found = {}
    random.seed(seeds["random_seed"])
    for name in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
        answers = getattr(model, name)([SimpleNamespace(args=text) for text in TEXTS])
        assert len(answers) == len(TEXTS)
        if name == "loglikelihood":
            assert all(type(answer) is tuple for answer in answers)
            answers = [number for number, greedy in answers if greedy]
        elif name == "generate_until":
            answers = [len(text) for text in answers]
        found[name] = sum((place + 1) * answer for place, answer in enumerate(answers))
        found[name + "_calls"] = model.calls
    model.calls = 0
    for number, options in enumerate(({"do_sample": True}, {"temperature": 0.5}, {"do_sample": False})):
        drawn = model.generate_until([SimpleNamespace(args=(text, options)) for text, _ in TEXTS])
        found[f"drawn_{number}"] = sum((place + 1) * float(answer.split()[-1]) for place, answer in enumerate(drawn))
        found[f"drawn_{number}_calls"] = model.calls
    return {"results": {task: found for task in tasks}} if os.environ.get("LOCAL_RANK", "0") == "0" else None
"""
_TASKS = """
class TaskManager:
    def match_tasks(self, names):
        return [name for name in names if name in ("counting", "broken")]
"""
_MODEL = """
import os
import random
class HFLM:
    def __init__(self, pretrained, tokenizer, batch_size):
        self.calls, self.tokenizer, self.size = 0, tokenizer, batch_size

    def _asked(self, requests):
        self.calls += len(requests)
        texts = [request.args[0] for request in requests]
        if os.environ.get("HARNESS_BREAKS") and "word 5" in texts:
            raise RuntimeError("a task of its own")
        return texts

    def loglikelihood(self, requests, disable_tqdm=False):
        return [(-0.1 * len(text), len(text) % 2 == 0) for text in self._asked(requests)]

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        return [-1 / (1 + len(text)) for text in self._asked(requests)]

    def generate_until(self, requests, disable_tqdm=False):
        drawn = [request.args[1] for request in requests if isinstance(request.args[1], dict)]
        chance = random.random if any("temperature" in one or one["do_sample"] for one in drawn) else lambda: 0.0
        return [f"{text.upper()} {chance()}" for text in self._asked(requests)]
"""


def write_harness(folder: Path) -> Path:
    """Writes the package; returns the folder to put on the path."""
    files = {"__init__": _PACKAGE, "tasks/__init__": _TASKS, "models/__init__": "", "models/huggingface": _MODEL}
    for name, text in files.items():
        path = folder / "lm_eval" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder
