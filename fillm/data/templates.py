"""How a question becomes a prompt, and where its answer begins."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fillm.errors import ModelError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_TEMPLATE = "Question: {question}\nAnswer: {answer}"
CHAT = "chat"

_QUESTION, _ANSWER = "{question}", "{answer}"


@dataclass(frozen=True)
class Template:
    """A prompt with a place for the question, and what stands around the answer.

    Attributes:
        before: text before the question.
        between: text between question and answer, without the blanks that lead up to the answer.
        lead: blanks before the answer; they are tokenised with it and count.
        after: text after the answer; counts too.
        chat: use the tokenizer's chat template in the place of `before` and `between`.
    """

    before: str
    between: str
    lead: str
    after: str
    chat: bool = False

    def prompt(self, question: str, tokenizer: "PreTrainedTokenizerBase") -> str:
        """The text that the model is given, none of which counts."""
        if not self.chat:
            return f"{self.before}{question}{self.between}"
        try:
            return tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # whatever the tokenizer's own template raises
            raise ModelError(f"--template chat: the tokenizer's chat template fails ({error})") from None

    def completion(self, answer: str) -> str:
        """The text that counts, but for the end-of-sequence token that follows it."""
        return f"{self.lead}{answer}{self.after}"


def parse_template(text: str) -> Template:
    r"""Reads a template: `chat`, or text with `{question}` and, behind it, `{answer}`.

    Without `{answer}` the answer follows after a space. A backslash and an n stand for a line break, so that a
    template can be typed in a shell. Other braces are text.

    Raises:
        UsageError: if a place is missing, doubled, or the answer comes first.
    """
    if text == CHAT:
        return Template("", "", "", "", chat=True)
    unescaped = text.replace("\\n", "\n")
    if unescaped.count(_QUESTION) != 1 or unescaped.count(_ANSWER) > 1:
        raise UsageError(f"--template {text!r}: write {_QUESTION} once and {_ANSWER} at most once, or 'chat'")
    before, _, rest = unescaped.partition(_QUESTION)
    if _ANSWER in before:
        raise UsageError(f"--template {text!r}: {_ANSWER} has to come after {_QUESTION}")
    if _ANSWER not in rest:
        return Template(before, rest.rstrip(" "), " ", "")
    between, _, after = rest.partition(_ANSWER)
    bare = between.rstrip(" ")
    return Template(before, bare, between[len(bare) :], after)


def require_chat_template(template: Template, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raises ModelError if the template is `chat` and the tokenizer has none."""
    if template.chat and not getattr(tokenizer, "chat_template", None):
        raise ModelError("--template chat: this tokenizer has no chat template; give a template with {question}")
