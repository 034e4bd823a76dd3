"""From rows to token samples: which text is prompt, which counts, and what gives way when a row is too long."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any

from fillm.data.files import SKIPPABLE
from fillm.data.rows import Row
from fillm.data.samples import IGNORED, Sample, SampleSet
from fillm.data.templates import DEFAULT_TEMPLATE, Template, parse_template, require_chat_template
from fillm.errors import DataError, ModelError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROW_FORMS = "question + answer, text + labels, text alone, or input_ids + labels"


class _BadRow(Exception):
    """What is wrong with one row; the caller adds where."""


@dataclass(frozen=True)
class _TextRow:
    """The text of one row; `prompt` is None where all of `completion` counts and nothing ends it."""

    prompt: str | None
    completion: str
    field: str
    add_special: bool


@dataclass(frozen=True)
class _Tokens:
    """One row before truncation: the first `front` ids are never cut, `field` is the one whose tokens count."""

    ids: list[int]
    labels: list[int]
    front: int
    field: str


def tokenize_rows(
    rows: Iterable[Row],
    tokenizer: "PreTrainedTokenizerBase | None",
    *,
    template: str = DEFAULT_TEMPLATE,
    max_length: int = 512,
    skip_bad_rows: bool = False,
    source: str | None = None,
    vocab_size: int | None = None,
) -> SampleSet:
    """Tokenises rows; the labels of the prompt are -100, the answer and the end-of-sequence token after it count.

    Prompt (with the tokenizer's special tokens before it) and answer (with the blank before it, without special
    tokens) are tokenised apart, so that no token straddles the border. The label of the first token never counts:
    nothing predicts it. A row longer than `max_length` loses prompt tokens from the left first (the special tokens in
    front stay, and at least one token before the answer), then answer tokens from the right.

    Args:
        rows: see docs/data.md for the forms a row can have.
        tokenizer: a transformers tokenizer; None if all rows carry `input_ids`.
        template: `chat`, or text with `{question}` and optionally `{answer}`.
        max_length: most tokens of a sample, at least 2.
        skip_bad_rows: leave bad rows out and list them in `SampleSet.skipped`.
        source: what the set is called in messages and records; None takes it from the first row.
        vocab_size: ids at or above it are refused; None takes it from the tokenizer, if there is one.

    Returns:
        At least one sample, in the order of the rows.

    Raises:
        DataError: names source, row and field of the first bad row; or no row is usable.
        ModelError: if the tokenizer lacks an end-of-sequence token or a chat template that is needed.
        UsageError: if an argument is out of range, or text is given without a tokenizer.
    """
    rows = list(rows)
    source = source or (rows[0].source if rows else "rows")
    if not rows:
        raise DataError(f"{source}: holds no rows")
    if max_length < 2:
        raise UsageError(f"--max-length {max_length}: give at least 2, one token to predict from and one to predict")
    parsed = parse_template(template)
    if tokenizer is not None:
        require_chat_template(parsed, tokenizer)
    if vocab_size is None and tokenizer is not None and any("input_ids" in row.fields for row in rows):
        vocab_size = 1 + max(tokenizer.get_vocab().values())  # not its length: some vocabularies have gaps

    tokens: dict[int, _Tokens] = {}  # by position in `rows`, as the two below
    texts: dict[int, _TextRow] = {}
    bad: dict[int, str] = {}
    for number, row in enumerate(rows):
        try:
            if row.fault is not None:
                raise _BadRow(row.fault)
            if "input_ids" in row.fields:
                tokens[number] = _ready_made(row.fields, tokenizer)
            else:
                texts[number] = _text_row(row, parsed, tokenizer)
        except _BadRow as error:
            bad[number] = str(error)
            if not skip_bad_rows:  # later rows do not matter: the first fault is the one to name
                break
    if texts:
        tokens |= _tokenize_texts(texts, tokenizer)

    samples: list[Sample] = []
    shortened: list[str] = []
    for number, row in enumerate(rows):
        if number in tokens:
            try:
                sample, lost = _finish(row.id, tokens[number], max_length, vocab_size)
                samples.append(sample)
                shortened += [row.id] if lost else []
            except _BadRow as error:
                bad[number] = str(error)
        if number in bad and not skip_bad_rows:
            raise DataError(f"{row.where}: {bad[number]}; {SKIPPABLE}")
    skipped = [(rows[number].where, why) for number, why in sorted(bad.items())]
    if not samples:
        where, why = skipped[0]
        raise DataError(f"{source}: none of {len(rows)} rows can be used; the first: {where}: {why}")
    return SampleSet(samples, source, skipped, shortened)


def _text_row(row: Row, template: Template, tokenizer: "PreTrainedTokenizerBase | None") -> _TextRow:
    fields = row.fields
    if "question" in fields:
        question, answer, field = "question", "answer", "answer"
    elif "text" in fields and "labels" not in fields:
        question, answer, field = None, "text", "text"
    elif "text" in fields:
        question, answer, field = "text", "labels", "labels"
    else:
        missing = "question" if "answer" in fields else "text" if "labels" in fields else "question"
        raise _BadRow(f"no field {missing!r}; a row has {ROW_FORMS}, this one has {_names(fields)}")
    completion = _string(fields, answer)
    prompt = None if question is None else _string(fields, question)
    if tokenizer is None:
        raise UsageError(f"{row.where}: text needs a tokenizer; give one, or rows with input_ids and labels")
    if prompt is None:
        return _TextRow(None, completion, field, add_special=True)
    # a chat template writes its own special tokens
    return _TextRow(template.prompt(prompt, tokenizer), template.completion(completion), field, not template.chat)


def _names(fields: Mapping[str, Any]) -> str:
    return ", ".join(map(str, fields)) or "no fields"


def _string(fields: Mapping[str, Any], name: str) -> str:
    if name not in fields:
        raise _BadRow(f"no field {name!r}; this row has {_names(fields)}")
    value = fields[name]
    if not isinstance(value, str):
        raise _BadRow(f"field {name!r} has to be text, not {type(value).__name__}")
    if not value.strip():
        raise _BadRow(f"field {name!r} is empty")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise _BadRow(f"field {name!r} holds half a surrogate pair, which is no character")
    return value


def _ready_made(fields: Mapping[str, Any], tokenizer: "PreTrainedTokenizerBase | None") -> _Tokens:
    ids, labels = _integers(fields, "input_ids"), _integers(fields, "labels")
    if len(ids) != len(labels):
        raise _BadRow(f"field 'labels' has {len(labels)} entries, 'input_ids' has {len(ids)}; they have to match")
    for position, (token, label) in enumerate(zip(ids, labels, strict=True)):
        if label not in (IGNORED, token):
            raise _BadRow(f"field 'labels'[{position}] is {label}; it has to be {IGNORED} or the token id {token}")
    begins = tokenizer is not None and bool(ids) and ids[0] == tokenizer.bos_token_id
    return _Tokens(ids, labels, int(begins), "labels")


def _integers(fields: Mapping[str, Any], name: str) -> list[int]:
    if name not in fields:
        raise _BadRow(f"no field {name!r}; this row has {_names(fields)}")
    value = fields[name]
    value = value.tolist() if hasattr(value, "tolist") else value  # numpy and torch
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise _BadRow(f"field {name!r} has to be a list of token ids, not {type(value).__name__}")
    for position, entry in enumerate(value):
        if not isinstance(entry, Integral) or isinstance(entry, bool):
            raise _BadRow(f"field {name!r}[{position}] is {entry!r}; token ids are whole numbers")
    return [int(entry) for entry in value]


def leading_special_tokens(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The ids a tokenizer puts before a text, such as BOS; those it puts behind (EOS, SEP) are not among them."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    dressed = tokenizer("a")["input_ids"]
    for start in range(len(dressed) - len(plain) + 1):
        if dressed[start : start + len(plain)] == plain:
            return dressed[:start]
    return []


def _tokenize_texts(texts: Mapping[int, _TextRow], tokenizer: "PreTrainedTokenizerBase") -> dict[int, _Tokens]:
    def encode(strings: list[str]) -> list[list[int]]:
        # verbose=False: the warning about the model's context length would come before we truncate
        return tokenizer(strings, add_special_tokens=False, verbose=False)["input_ids"]

    special, bos, eos = leading_special_tokens(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id
    if eos is None and any(text.prompt is not None for text in texts.values()):
        raise ModelError("the tokenizer has no end-of-sequence token to end an answer with; set its eos_token")
    prompts = encode([text.prompt or "" for text in texts.values()])
    completions = encode([text.completion for text in texts.values()])
    tokens: dict[int, _Tokens] = {}
    for (number, text), prompt, completion in zip(texts.items(), prompts, completions, strict=True):
        front = special if text.add_special else [bos] if prompt[:1] == [bos] else []
        context = special + prompt if text.add_special else prompt
        if completion and text.prompt is not None:
            completion = [*completion, eos]
        tokens[number] = _Tokens(context + completion, [IGNORED] * len(context) + completion, len(front), text.field)
    return tokens


def _finish(name: str, tokens: _Tokens, limit: int, vocab_size: int | None) -> tuple[Sample, bool]:
    """Truncates and checks one sample; also whether it lost tokens that count."""
    ids, labels = tokens.ids, [IGNORED, *tokens.labels[1:]]  # nothing predicts the first token
    counted = [position for position, label in enumerate(labels) if label != IGNORED]
    if not counted:
        raise _BadRow(f"field {tokens.field!r} has no token that counts")
    bound = 2**63 if vocab_size is None else vocab_size
    for position, token in enumerate(ids):
        if token < 0:
            raise _BadRow(f"token id {token} at position {position} is negative; token ids begin at 0")
        if token >= bound:
            raise _BadRow(f"token id {token} at position {position} is outside the vocabulary of {bound} ids")
    front = tokens.front
    cut = max(0, min(len(ids) - limit, counted[0] - max(front, 1)))  # of the prompt; one token has to stay before
    ids = (ids[:front] + ids[front + cut :])[:limit]
    labels = (labels[:front] + labels[front + cut :])[:limit]
    left = sum(label != IGNORED for label in labels)
    if not left:
        raise _BadRow(f"field {tokens.field!r} has no token left after truncation to {limit} tokens")
    return Sample(name, tuple(ids), tuple(labels)), left < len(counted)
