"""What a finished pass found, kept in the run folder, so that an interrupted run does not make it again."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from fillm.evaluate.answer_tokens import AnswerTokens
from fillm.runs import RunFolder

_COLUMNS = ("token_ids", "log_probs", "predicted")
_MOMENTS = ("mean_log_probs", "std_log_probs")


def kept_answers(folder: RunFolder | None, stage: str, run: Callable[[], list[AnswerTokens]]) -> list[AnswerTokens]:
    """What the stage found before, or what `run` finds now.

    Args:
        folder: of the run; None keeps nothing.
        stage: its name in the folder.
        run: makes the pass.

    Raises:
        RunFolderError: what was kept is damaged, or the disk refuses.
    """
    found = None if folder is None else folder.load_stage(stage)
    if found is not None:
        columns = {name: tensor.numpy() for name, tensor in found[0].items()}
        ends = columns.pop("ends").tolist()
        spans = [slice(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]
        return [AnswerTokens(**{name: column[span] for name, column in columns.items()}) for span in spans]
    answers = run()
    if folder is not None:
        names = _COLUMNS if answers[0].mean_log_probs is None else _COLUMNS + _MOMENTS
        tensors = {name: torch.from_numpy(np.concatenate([getattr(one, name) for one in answers])) for name in names}
        tensors["ends"] = torch.tensor([len(one.token_ids) for one in answers]).cumsum(0)
        folder.save_stage(stage, tensors, {})
    return answers


def kept_texts(folder: RunFolder | None, stage: str, run: Callable[[], list[str]]) -> Sequence[str]:
    """As `kept_answers`, of texts."""
    found = None if folder is None else folder.load_stage(stage)
    if found is not None:
        return list(found[1]["texts"])
    texts = run()
    if folder is not None:
        folder.save_stage(stage, {"count": torch.tensor([len(texts)])}, {"texts": list(texts)})
    return texts
