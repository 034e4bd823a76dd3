"""What a finished pass found, kept in the run folder, so that an interrupted run does not make it again."""

import json
from collections.abc import Callable, Sequence

import torch

from fillm.evaluate.answer_tokens import AnswerTokens, answers_of, columns_of
from fillm.evaluate.dealing import Deal
from fillm.runs import RunFolder


def kept_answers(
    folder: RunFolder | None,
    stage: str,
    counts: Sequence[int],
    moments: bool,
    run: Callable[[], list[AnswerTokens]],
    deal: Deal,
) -> list[AnswerTokens]:
    """What the stage found before, or what `run` finds now; the same in all processes.

    Args:
        folder: of the run; None keeps nothing, and in other processes than the first.
        stage: its name in the folder.
        counts: tokens of every answer.
        moments: whether the answers have those over the vocabulary.
        run: makes the pass.
        deal: of the run.

    Raises:
        RunFolderError: what was kept is damaged, or the disk refuses.
    """
    found = None if folder is None else folder.load_stage(stage)
    if deal.known(found is not None):
        columns = columns_of({}, counts, moments)
        for name, column in columns.items() if found is not None else ():
            column.copy_(found[0][name])
        deal.share(columns)
        return answers_of(columns, counts)
    answers = run()
    if folder is not None:
        tensors = columns_of(dict(enumerate(answers)), counts, moments)
        folder.save_stage(stage, {**tensors, "ends": torch.tensor(counts).cumsum(0)}, {})
    return answers


def kept_texts(folder: RunFolder | None, stage: str, run: Callable[[], list[str]], deal: Deal) -> Sequence[str]:
    """As `kept_answers`, of texts."""
    found = None if folder is None else folder.load_stage(stage)
    if deal.known(found is not None):
        return list(json.loads(deal.processes.tell(json.dumps(found[1]["texts"] if found is not None else []))[0]))
    texts = run()
    if folder is not None:
        folder.save_stage(stage, {"count": torch.tensor([len(texts)])}, {"texts": list(texts)})
    return texts
