"""Greedy answers to prompts, many at a time."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from fillm.capture import frozen
from fillm.errors import DataError, NumericsError, UsageError
from fillm.evaluate.dealing import Deal
from fillm.evaluate.halving import Halving
from fillm.models import quiet_transformers
from fillm.models.finite import not_finite
from fillm.rank.console import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Most answers end within these. The rows that go on are gathered into new batches, so that one row that repeats itself
# does not keep all others of its batch waiting; reading them again costs one forward pass.
_FIRST_TOKENS, _GROWTH = 64, 4


class _Spoilt(LogitsProcessor):
    """Notes the rows of which the likeliest token cannot be told: a comparison with NaN picks any.

    Args:
        rows: of the batch.
        device: of the model.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self.rows = torch.zeros(rows, dtype=torch.bool, device=device)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.rows |= ~scores.amax(dim=-1).isfinite().to(self.rows.device)
        return scores


def greedy_answers(
    model: nn.Module,
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 200,
    batch_size: int,
    progress: Progress | None = None,
    notice: Callable[[str], None] | None = None,
    deal: Deal | None = None,
) -> list[str]:
    """What a model answers when it always takes the likeliest token.

    Prompts are padded on the left and grouped by length. Nothing but the logits decides: whatever the model's own
    generation settings say of sampling, penalties or lengths is set aside. An answer ends before the tokenizer's
    end-of-sequence token or any that the model's generation settings name, after `max_new_tokens`, or where the model
    has no further positions.

    Args:
        model: a causal language model of transformers, on its device; comes back in the mode it came in.
        tokenizer: its tokenizer.
        prompts: token ids, at least one each.
        max_new_tokens: most tokens of an answer, at least 1.
        batch_size: most prompts at a time, at least 1; the answers do not depend on it but for the rounding of the
            model's own products, where two tokens are as good as equally likely.
        progress: told of every prompt that has its answer, with the tokens of the answer.
        notice: told when batches are halved for want of memory.
        deal: of the batches to several processes, which all get all answers.

    Returns:
        The answers in the order of the prompts, without special tokens and without blanks at their ends.

    Raises:
        DataError: a prompt that is empty, or that leaves the model no position for an answer.
        NumericsError: logits that are no numbers; names the prompt.
        UsageError: a limit below 1.
        OutOfMemoryError: not even one prompt fits.
    """
    if batch_size < 1:
        raise UsageError(f"--batch-size {batch_size}: give at least 1")
    if max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens {max_new_tokens}: give at least 1")
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    room = _room(base, prompts, max_new_tokens)
    stops = _stops(base, tokenizer)
    answers: list[list[int]] = [[] for _ in prompts]
    pending, halving, total, deal = list(range(len(prompts))), Halving(notice), _FIRST_TOKENS, deal or Deal()
    own: set[int] = set()  # what this process has worked on in the turn at hand

    def text(position: int) -> list[int]:
        return [*prompts[position], *answers[position]]

    def work(part: list[int]) -> None:
        steps = min(min(total, room[i]) - len(answers[i]) for i in part)
        spoilt = _Spoilt(len(part), next(base.parameters()).device)
        grown = _continued(base, [text(i) for i in part], steps, stops, spoilt)
        if bool(spoilt.rows.any()):
            raise NumericsError(not_finite(base, f"a logit of prompt {part[int(spoilt.rows.int().argmax())] + 1}"))
        for position, more in zip(part, grown, strict=True):
            answers[position] += more
        own.update(part)
        tell_of(part)

    def halved(batch: Sequence[int]) -> None:
        halving.run(batch, work, lambda i: len(text(i)))

    def tell_of(part: Iterable[int]) -> None:
        if progress is not None:
            over = [i for i in part if _ended(answers[i], room[i], stops)]
            progress.advance(len(over), sum(len(answers[i]) for i in over))

    with frozen(model), torch.no_grad(), quiet_transformers(), _own_settings_aside(base):
        while pending:
            # Longest first, so that a lack of memory shows at once.
            turn = sorted((i for i in pending if len(answers[i]) < total), key=lambda i: (-len(text(i)), i))
            if not turn:
                total *= _GROWTH
            batches = [turn[begin : begin + batch_size] for begin in range(0, len(turn), batch_size)]
            own.clear()
            deal.run("generation", batches, halved, None, len)
            if deal.processes.count > 1 and turn:
                _share(deal, turn, answers, own)
                tell_of(i for i in turn if i not in own)
            pending = [i for i in pending if not _ended(answers[i], room[i], stops)]
    ids = [answer[:-1] if answer[-1] in stops else answer for answer in answers]
    texts = [tokenizer.decode(one, skip_special_tokens=True, clean_up_tokenization_spaces=False) for one in ids]
    return [one.strip() for one in texts]


def _share(deal: Deal, turn: Sequence[int], answers: list[list[int]], own: Collection[int]) -> None:
    """Gives every process the answers of a turn as those have them that worked on them."""
    lengths = torch.tensor([len(answers[i]) if i in own else 0 for i in turn])
    deal.share({"lengths": lengths})
    tokens = torch.zeros(len(turn), int(lengths.max()), dtype=torch.int64)
    for row, i in enumerate(turn):
        if i in own:
            tokens[row, : len(answers[i])] = torch.tensor(answers[i])
    deal.share({"tokens": tokens})
    for row, (i, length) in enumerate(zip(turn, lengths.tolist(), strict=True)):
        answers[i] = tokens[row, :length].tolist()


def _room(model: nn.Module, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[int]:
    """How many tokens each answer may have."""
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    room = []
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise DataError(f"prompt {number + 1} has no tokens; leave its row out")
        left = max_new_tokens
        if isinstance(positions, int) and positions > 0:
            left = min(left, positions - len(prompt))
        if left < 1:
            raise DataError(
                f"prompt {number + 1} has {len(prompt)} tokens, the model has {positions} positions, and none is left "
                f"for an answer; give --max-length below {positions}"
            )
        room.append(left)
    return room


def _stops(model: nn.Module, tokenizer: "PreTrainedTokenizerBase") -> frozenset[int]:
    """The tokens that end an answer."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    named = own if isinstance(own, list | tuple) else [own]
    return frozenset(int(token) for token in (*named, tokenizer.eos_token_id) if token is not None)


def _ended(answer: Sequence[int], room: int, stops: frozenset[int]) -> bool:
    return len(answer) >= room or (len(answer) > 0 and answer[-1] in stops)


def _continued(
    model: Any, texts: Sequence[Sequence[int]], steps: int, stops: frozenset[int], spoilt: _Spoilt
) -> list[list[int]]:
    """Up to `steps` further tokens of each text; the one that ends it is the last."""
    width, device = max(map(len, texts)), next(model.parameters()).device
    # Any valid id will do for padding: the mask hides it.
    ids = torch.tensor([[one[0]] * (width - len(one)) + list(one) for one in texts], device=device)
    mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in texts], device=device)
    padding = min(stops, default=0)  # what follows the end of a row in what is returned
    settings = GenerationConfig(
        max_new_tokens=steps, do_sample=False, num_beams=1, eos_token_id=sorted(stops) or None, pad_token_id=padding
    )
    found = model.generate(
        input_ids=ids,
        attention_mask=mask,
        generation_config=settings,
        logits_processor=LogitsProcessorList([spoilt]),
    )
    grown = found[:, width:].tolist()
    ends = [next((place + 1 for place, token in enumerate(row) if token in stops), len(row)) for row in grown]
    return [row[:end] for row, end in zip(grown, ends, strict=True)]


@contextmanager
def _own_settings_aside(model: Any) -> Iterator[None]:
    """Without the settings a model was saved with: transformers fills what is left open from them."""
    own = getattr(model, "generation_config", None)
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
