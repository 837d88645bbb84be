"""A chat template at work: conversations as texts, and where an assistant's turn ends."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jinja2 import TemplateError

from tuneyard.runners.failures import BadData, BadSpec
from tuneyard.runners.rows import Message

DATE = "26 Jul 2024"
"""What a template that prints the day is given: a run must not depend on when it runs."""

TEMPLATES = {
    "alpaca": (
        "{% for m in messages %}"
        "{% if m['role'] == 'system' %}{{ m['content'] + '\n\n' }}"
        "{% elif m['role'] == 'user' %}{{ '### Instruction:\n' + m['content'] + '\n\n' }}"
        "{% else %}{{ '### Response:\n' + m['content'] + eos_token + '\n\n' }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
    ),
    "chatml": (
        "{% for m in messages %}"
        "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
}
"""Templates for bases that bring none, by the names that LLaMA-Factory gives them."""

_MARK = "answer7f3a9c"


@dataclass(frozen=True)
class Chat:
    """A tokenizer and the template that speaks through it.

    template: jinja, rendered in transformers' sandbox, or nothing where plain text is learned;
    default_system: for conversations without.
    """

    tokenizer: Any
    template: str
    name: str = "tokenizer"
    default_system: str | None = None

    def render(
        self,
        messages: Sequence[Message],
        *,
        generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        line: int | None = None,
    ) -> str:
        """The conversation as text. Raises: BadData when the template refuses it."""
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages),
                tools=list(tools) if tools else None,
                chat_template=self.template,
                add_generation_prompt=generation_prompt,
                tokenize=False,
                date_string=DATE,
                strftime_now=lambda _format: DATE,
            )
        except (TemplateError, TypeError) as error:  # a template that adds None to a text
            raise BadData(f"The chat template refuses this: {error}", line=line) from None
        return str(text)

    def with_system(self, messages: Sequence[Message]) -> list[Message]:
        """The messages, led by the default system message if there is one and they have none."""
        if not self.default_system or messages[0]["role"] == "system":
            return list(messages)
        return [{"role": "system", "content": self.default_system}, *messages]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of rendered texts. Nothing is added: the template wrote all there is."""
        backend = self.tokenizer.backend_tokenizer
        return [e.ids for e in backend.encode_batch_fast(list(texts), add_special_tokens=False)]

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

    def stop_ids(self, generation_ends: Sequence[int] = ()) -> list[int]:
        """All ids that end a turn: the configuration's, the tokenizer's, the template's."""
        found = {*generation_ends, self.tokenizer.eos_token_id, self.closing_id}
        return sorted(i for i in found if i is not None)


def chat_of(
    tokenizer: Any, *, template: str | None, default_system: str | None, needed: bool = True
) -> Chat:
    """The template asked for, else the tokenizer's own. Raises: BadSpec when one is needed.

    template: a name of TEMPLATES, jinja itself, or nothing. Any other name means the base's own
    template, as that is what such a base was tuned with.
    """
    own = tokenizer.chat_template
    if isinstance(own, dict):
        own = own.get("default")
    if template and "{" in template:
        return Chat(tokenizer, template, "given", default_system)
    if template in TEMPLATES and not (template == "chatml" and own):
        return Chat(tokenizer, TEMPLATES[template], template, default_system)
    if own:
        return Chat(tokenizer, own, "tokenizer", default_system)
    if not needed and not template:
        return Chat(tokenizer, "")
    raise BadSpec(
        "The base has no chat template"
        + (f", and {template!r} is not one that we have." if template else "."),
        field="template",
        hint=f"set template to one of {', '.join(TEMPLATES)}, or to jinja of your own",
    )
