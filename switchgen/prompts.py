"""How each candidate sees a trace, and how the switcher sees a signed trace.

A tuned candidate reads the conversation in its chat template and the trace as the beginning of the open assistant turn.
A base model reads plain text. Both are prompt tokens followed by the trace's own tokens, so they only grow.

Text from users and candidates never counts as structure: it is tokenized without control tokens, and patterns that look
like the switcher's signatures are escaped (`SwitcherFormat.neutralise`).
"""

from __future__ import annotations

import copy
import datetime
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from switchgen.errors import ModelError
from switchgen.trace import Query
from switchgen.vocabulary import Vocabulary

PLAIN_TEMPLATE = "{query}\n{trace}"
PINNED_DATE = datetime.datetime(2024, 7, 26)
"""The day it is for chat templates that ask (Llama 3's own default)."""

_DATE = re.compile(r"strftime_now\(\s*(?:'([^']*)'|\"([^\"]*)\")")
# Private-use characters mark where a message's content goes while the chat template is rendered.
_SLOT = "\ue000{}\ue001"


@dataclass(frozen=True)
class SwitcherFormat:
    """How the switcher is shown who wrote what, and how it is asked; labels are one digit, so pools hold 2 to 10."""

    name: str
    signed: str
    """One signed segment, with `{writer}` and `{text}`, and what sets it apart from what stands before it."""
    asks: str
    """The question that ends the prompt, with `{last}`, the largest label."""
    forged: re.Pattern[str]
    """The place in front of which a text that looks like a signature is escaped."""

    def neutralise(self, text: str) -> str:
        r"""Escape what looks like a signature: `<model 2 ends>` becomes `<\model 2 ends>`.

        A pattern that already carries backslashes gets one more, so that different texts stay different.
        """
        return self.forged.sub(lambda found: found[0] + "\\", text)

    def signature(self, writer: int, segment: str) -> str:
        """One signed segment of the switcher's prompt, with the space before it."""
        return self.signed.format(writer=writer, text=self.neutralise(segment))

    def question(self, num_candidates: int) -> str:
        """The question that ends the switcher's prompt."""
        return self.asks.format(last=num_candidates - 1)

    def prompt(self, query: str, segments: Sequence[tuple[int, str]], num_candidates: int) -> str:
        """The whole prompt, before the chat template.

        Args:
            query: what the user asked.
            segments: (writer, text) of each segment so far, in order.
            num_candidates: size of the pool, 2 to 10.

        Raises:
            ValueError: the pool is too small or too large for one-digit labels.
        """
        check_pool_size(num_candidates)
        signed = "".join(self.signature(writer, text) for writer, text in segments)
        return self.neutralise(query) + signed + self.question(num_candidates)


RELEASED = SwitcherFormat(
    name="released",
    signed=" <model {writer} begins> {text} <model {writer} ends>",
    asks=" Which model should generate the next segment? Please respond with a number from 0 to {last}. "
    "The answer is model ",
    forged=re.compile(r"<(?=\\*\s*model\s+\d+\s+(?:begins|ends)\s*>)", re.IGNORECASE),
)
"""The format of the paper's code and its published switchers (arXiv 2510.09913)."""

COMPACT = SwitcherFormat(
    name="compact",
    signed=" [{writer}] {text}",
    asks=" [",
    forged=re.compile(r"\[(?=\\*\s*\d+\s*\])"),
)
"""A mark a segment and one to ask: a few tokens instead of some forty, for switchers that are fitted here."""

FORMATS = {switcher_format.name: switcher_format for switcher_format in (RELEASED, COMPACT)}


def check_pool_size(num_candidates: int) -> None:
    """Labels are one digit.

    Raises:
        ValueError: the pool is too small or too large.
    """
    if not 2 <= num_candidates <= 10:
        raise ValueError(f"a switcher chooses between 2 and 10 candidates; got {num_candidates}")


def plain_prompt_ids(vocabulary: Vocabulary, query: Query, template: str) -> list[int]:
    """Tokens a base model reads before the trace: its start token if it has one, then the filled template."""
    head, _, tail = template.removesuffix("{trace}").partition("{query}")
    return [*start_ids(vocabulary), *vocabulary.encode_text(head + query.text + tail, opens=True)]


def start_ids(vocabulary: Vocabulary) -> list[int]:
    """The tokens that the tokenizer itself puts before a text (a BOS, usually, or nothing)."""
    tokenizer = vocabulary.tokenizer
    with_special = tokenizer("a")["input_ids"]
    start: list[int] = []
    for index in with_special:
        if index not in vocabulary.control_ids:
            break
        start.append(index)
    return start


def chat_prompt_ids(vocabulary: Vocabulary, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Tokens of a conversation in the chat template, ending with the opened assistant turn."""
    return [index for piece in chat_pieces(vocabulary, messages) for index in piece]


def chat_pieces(vocabulary: Vocabulary, messages: Sequence[Mapping[str, str]]) -> list[list[int]]:
    """Token lists: template, content, template, content, …, template, each tokenized by itself.

    The template's own text may hold control tokens, the contents may not.

    Raises:
        ModelError: the template refuses the conversation, or does more to a content than strip it.
    """
    tokenizer = vocabulary.tokenizer
    slots = [_SLOT.format(index) for index in range(len(messages))]
    with_slots = [{**message, "content": slot} for message, slot in zip(messages, slots, strict=True)]
    try:
        rendered = _render(tokenizer, with_slots)
        real = _render(tokenizer, [dict(message) for message in messages])
    except Exception as error:  # a template raises whatever jinja lets it raise
        roles = ", ".join(message["role"] for message in messages)
        raise ModelError(f"{vocabulary.source}: its chat template refuses a conversation of {roles}: {error}") from None
    pieces: list[str] = []
    rest = rendered
    for slot in slots:
        head, found, rest = rest.partition(slot)
        if not found or slot in rest:
            raise ModelError(
                f"{vocabulary.source}: its chat template drops or repeats a message; use prompt: plain or a template"
            )
        pieces.append(head)
    pieces.append(rest)
    contents = _contents_as_rendered(real, pieces, [message["content"] for message in messages])
    if contents is None:
        raise ModelError(
            f"{vocabulary.source}: its chat template rewrites the messages; use prompt: plain or a template"
        )
    ids = [vocabulary.encode_template(pieces[0])]
    for content, piece in zip(contents, pieces[1:], strict=True):
        ids.append(vocabulary.encode_text(content) if content else [])
        ids.append(vocabulary.encode_template(piece, opens=False) if piece else [])
    return ids


def _contents_as_rendered(real: str, pieces: Sequence[str], contents: Sequence[str]) -> list[str] | None:
    """The contents as the template puts them between its pieces, perhaps stripped; None if it changes them more."""
    if not real.startswith(pieces[0]):
        return None
    rest = real[len(pieces[0]) :]
    rendered: list[str] = []
    for content, piece in zip(contents, pieces[1:], strict=True):
        forms = (content, content.strip(), content.lstrip(), content.rstrip())
        form = next((form for form in forms if rest.startswith(form + piece)), None)
        if form is None:
            return None
        rendered.append(form)
        rest = rest[len(form + piece) :]
    return None if rest else rendered


def _render(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> str:
    template = tokenizer.get_chat_template()
    rendered: str = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, chat_template=_dated(template)
    )
    return rendered


def _dated(template: str) -> str:
    """The template with its questions for today's date answered: a response must not depend on the day."""
    formats = {single or double for single, double in _DATE.findall(template)}
    if not formats:
        return template
    answers = json.dumps({form: PINNED_DATE.strftime(form) for form in formats})
    # A macro hides the function of the same name. The empty string keeps a line break at the template's beginning.
    return f"{{%- macro strftime_now(format) -%}}{{{{ {answers}[format] }}}}{{%- endmacro -%}}{{{{ '' }}}}{template}"


class SwitcherPrompt:
    """The prompt as tokens that only append: head, query, signed segments; then a question that is rewound.

    A switcher with a chat template reads one user message; one without reads the plain text. Every part is tokenized by
    itself, so the ids can differ from those of the whole string where a merge would cross a border.

    Raises:
        ModelError: a label "0" … "n-1" is not one token where the answer starts.
    """

    def __init__(
        self, vocabulary: Vocabulary, num_candidates: int, *, chat: bool, format: SwitcherFormat = RELEASED
    ) -> None:
        check_pool_size(num_candidates)
        self.format = format
        self.vocabulary = vocabulary
        self.num_candidates = num_candidates
        if chat:
            # An unlikely letter stands for the message; what the template puts around it is the head and the tail.
            head, _, tail = chat_pieces(vocabulary, [{"role": "user", "content": "x"}])
        else:
            head, tail = start_ids(vocabulary), []
        self.head_ids = head
        self._opens = not chat
        self._tail_ids = tail
        self.question_ids = [*vocabulary.encode_text(format.question(num_candidates)), *tail]
        self.label_ids = [self._label_id(label) for label in range(num_candidates)]

    def asking(self, text: str) -> SwitcherPrompt:
        """The same prompt with another question in place of the switcher's."""
        other = copy.copy(self)
        other.question_ids = [*self.vocabulary.encode_text(text), *self._tail_ids]
        return other

    def _label_id(self, label: int) -> int:
        ids = self.vocabulary.encode_text(str(label))
        if len(ids) != 1 or self.vocabulary.decode(ids) != str(label):
            raise ModelError(
                f"{self.vocabulary.source}: the label {str(label)!r} is not one token; a switcher "
                "needs one token a label"
            )
        return ids[0]

    def query_ids(self, query: Query) -> list[int]:
        """Tokens before the first segment."""
        return [*self.head_ids, *self.vocabulary.encode_text(self.format.neutralise(query.text), opens=self._opens)]

    def segment_ids(self, writer: int, text: str) -> list[int]:
        """Tokens that one signed segment appends."""
        return self.vocabulary.encode_text(self.format.signature(writer, text))

    def full_ids(self, query: Query, segments: Sequence[tuple[int, str]]) -> list[int]:
        """The whole prompt's tokens, question included: what training and inference both read."""
        ids = self.query_ids(query)
        for writer, text in segments:
            ids.extend(self.segment_ids(writer, text))
        return [*ids, *self.question_ids]
