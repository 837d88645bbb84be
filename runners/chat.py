"""A chat template at work: conversations as texts, and where an assistant's turn ends."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError

from tuneyard.runners.failures import BadData, BadSpec
from tuneyard.runners.layouts import LAYOUTS, SEAM, jinja
from tuneyard.runners.rows import Message

DATE = "26 Jul 2024"
"""What a template that prints the day is given: a run must not depend on when it runs."""

_CLOCK = f"{{% macro strftime_now(format) %}}{DATE}{{% endmacro %}}"
"""Before each template: transformers 5.23 hands no functions over, and its own tells the day."""

_MARK = "answer7f3a9c"
_SPECIAL = re.compile(r"<\|\w+\|>|<(?:start|end)_of_turn>")

_OF_A_TEMPLATE = (
    TemplateError,
    TypeError,
    ValueError,
    ArithmeticError,
    LookupError,
    AttributeError,
)
"""What a template's own code ends in: None added to a text, 1 / 0, a range that is too long."""


@dataclass(frozen=True)
class Chat:
    """A tokenizer and the template that speaks through it.

    template: jinja, rendered in transformers' sandbox, or nothing where plain text is learned;
    default_system: for conversations without; seamed: the same template with SEAMs, of a layout of
    LLaMA-Factory's, which also learns all that closes an answer.
    """

    tokenizer: Any
    template: str
    name: str = "tokenizer"
    default_system: str | None = None
    seamed: str | None = None

    def render(
        self,
        messages: Sequence[Message],
        *,
        generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        line: int | None = None,
        seams: bool = False,
    ) -> str:
        """The conversation as text.

        Raises: BadData when the template refuses it, BadSpec when the template is no jinja.
        """
        template = self.seamed if seams and self.seamed else self.template
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages),
                tools=list(tools) if tools or (tools is not None and self.seamed) else None,
                chat_template=_CLOCK + template,
                add_generation_prompt=generation_prompt,
                tokenize=False,
                date_string=DATE,
            )
        except TemplateSyntaxError as error:
            message = f"The chat template is no jinja: line {error.lineno}: {error.message}"
            raise BadSpec(message, field="template") from None
        except _OF_A_TEMPLATE as error:
            raise BadData(f"The chat template refuses this: {error}", line=line) from None
        return str(text)

    def with_system(self, messages: Sequence[Message]) -> list[Message]:
        """The messages, led by the default system message if there is one and they have none."""
        if not self.default_system or messages[0]["role"] == "system":
            return list(messages)
        return [{"role": "system", "content": self.default_system}, *messages]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of rendered texts. Nothing is added: the template wrote all there is."""
        encode = self.tokenizer.backend_tokenizer.encode_batch_fast
        pieces = [text.split(SEAM) if self.seamed else [text] for text in texts]
        flat = [piece for each in pieces for piece in each]
        ids = (encoding.ids for encoding in encode(flat, add_special_tokens=False))
        return [[i for _ in each for i in next(ids)] for each in pieces]

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of all tokens that are not text."""
        added = self.tokenizer.added_tokens_decoder
        special = {i for i, token in added.items() if token.special}
        return frozenset(special | set(self.tokenizer.all_special_ids))

    @cached_property
    def closing_id(self) -> int | None:
        """The special token that closes an assistant's turn, found by rendering one."""
        if not self.template:
            return None
        asked = {"role": "user", "content": "question"}
        text = self.render([asked, {"role": "assistant", "content": _MARK}])
        (ids,) = self.encode([text.partition(_MARK)[2]])
        return next((i for i in ids if i in self.special_ids), None)

    @cached_property
    def writes_calls(self) -> bool:
        """Whether the template writes which function an answer calls; many leave it out."""
        call = {"type": "function", "function": {"name": _MARK, "arguments": {}}}
        asked = {"role": "user", "content": "question"}
        answer = {"role": "assistant", "content": "", "tool_calls": [call]}
        try:
            return _MARK in self.render([asked, answer])
        except BadData:
            return True  # it wants more than this, so it knows of calls

    def foreign_marks(self) -> list[str]:
        """What one of our layouts writes as one token each, and this tokenizer cuts up."""
        if self.name not in LAYOUTS:
            return []
        said = self.render(
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        )
        marks = dict.fromkeys(_SPECIAL.findall(said))
        return [m for m in marks if len(self.tokenizer.encode(m, add_special_tokens=False)) > 1]

    def stop_ids(self, generation_ends: Sequence[int] = ()) -> list[int]:
        """All ids that end a turn: the configuration's, the tokenizer's, the template's."""
        found = {*generation_ends, self.tokenizer.eos_token_id, self.closing_id}
        return sorted(i for i in found if i is not None)


def chat_of(
    tokenizer: Any, *, template: str | None, default_system: str | None, needed: bool = True
) -> Chat:
    """The template asked for, else the tokenizer's own. Raises: BadSpec when one is needed.

    template: a name of LAYOUTS, jinja itself, or nothing. Any other name means the base's own
    template, as that is what such a base was tuned with.
    """
    own = tokenizer.chat_template
    if isinstance(own, dict):
        own = own.get("default")
    if template and "{" in template:
        return Chat(tokenizer, template, "given", default_system)
    if template is not None and template in LAYOUTS:
        layout = LAYOUTS[template]
        written, seamed = (
            jinja(layout, default_system=default_system, seams=seams) for seams in (False, True)
        )
        return Chat(tokenizer, written, template, default_system, seamed)
    if own:
        return Chat(tokenizer, own, "tokenizer", default_system)
    if not needed and not template:
        return Chat(tokenizer, "")
    raise BadSpec(
        "The base has no chat template"
        + (f", and {template!r} is not one that we have." if template else "."),
        field="template",
        hint=f"set template to one of {', '.join(LAYOUTS)}, or to jinja of your own",
    )
