"""Rows as token ids and labels: conversations turn by turn, cut as LLaMA-Factory cuts.

Labels are set by position, never by token id: where pad is eos, the end of a turn stays a target.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tuneyard.runners.chat import Chat
from tuneyard.runners.failures import BadData, BadSpec
from tuneyard.runners.rows import (
    Conversation,
    Message,
    Opinion,
    Preference,
    StageRow,
    Text,
    Unanswered,
)
from tuneyard.specs.rewards import ONLINE

IGNORED = -100
"""The label of a token that is not a target: torch's default for cross entropy."""

ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class Example:
    """A row ready for training; ``labels[i]`` is ``ids[i]`` or IGNORED."""

    ids: list[int]
    labels: list[int]

    @property
    def targets(self) -> int:
        """How many tokens are learned. The first token is nobody's target."""
        return sum(label != IGNORED for label in self.labels[1:])


@dataclass(frozen=True)
class Pair:
    """One question with the answer that is wanted, and with the other one."""

    chosen: Example
    rejected: Example

    @property
    def targets(self) -> int:
        """How many tokens are learned; 0 where one of the answers was cut away."""
        return min(self.chosen.targets, self.rejected.targets)


@dataclass(frozen=True)
class Labelled:
    """An answer that is wanted or not; mismatched: the same question with another row's answer."""

    example: Example
    mismatched: Example
    wanted: bool

    @property
    def targets(self) -> int:
        """How many tokens are learned."""
        return self.example.targets


@dataclass(frozen=True)
class Question:
    """What the model itself is to answer, and the row that asks it; no tokens: it was too long."""

    ids: list[int]
    row: Unanswered

    @property
    def targets(self) -> int:
        """Whether there is something to answer."""
        return len(self.ids)


@dataclass(frozen=True)
class Drawn:
    """An answer that the model drew, and how much better it is than others to its question."""

    example: Example
    advantage: float

    @property
    def targets(self) -> int:
        """How many tokens are learned."""
        return self.example.targets


@dataclass(frozen=True)
class Pack:
    """Several examples that count as one. apart: none sees another, as with neat_packing."""

    parts: tuple[Example, ...]
    apart: bool

    @property
    def targets(self) -> int:
        """How many tokens are learned; the first of each example is nobody's target."""
        return sum(part.targets for part in self.parts)


Item = Example | Pair | Labelled | Question | Drawn | Pack
"""What a row of training data becomes, by stage; or several of them together."""


def sequences_of(item: Item) -> tuple[Example, ...]:
    """The token sequences of an item, in the order in which they are stored or laid out."""
    if isinstance(item, Pair):
        return item.chosen, item.rejected
    if isinstance(item, Labelled):
        return item.example, item.mismatched
    if isinstance(item, Question):
        return (Example(item.ids, [IGNORED] * len(item.ids)),)
    if isinstance(item, Drawn):
        return (item.example,)
    if isinstance(item, Pack):
        return item.parts
    return (item,)


@dataclass(frozen=True)
class Cutting:
    """Which tokens are kept and which are targets. blocks: texts are joined and cut in blocks."""

    cutoff_len: int = 2048
    train_on_prompt: bool = False
    mask_history: bool = False
    blocks: bool = True


Piece = tuple[list[int], list[int], bool]
"""Source ids, target ids, whether the target is trained."""


@dataclass(frozen=True)
class Turn:
    """What stands before an answer, and the answer with what closes it."""

    source: str
    target: str
    trained: bool


@dataclass(frozen=True)
class Encoded:
    """All items that teach something, and how many rows did not or only in part.

    kept: for each item the place of what it was made of.
    """

    examples: list[Item]
    skipped: int = 0
    last_turn_only: int = 0
    kept: Sequence[int] = ()


Progress = Callable[[int], None]


def encode(
    rows: Sequence[StageRow],
    chat: Chat,
    cutting: Cutting,
    *,
    stage: str = "sft",
    progress: Progress = lambda done: None,
) -> Encoded:
    """Tokenise all rows. Raises: BadData when the template refuses one or nothing is left."""
    encoded = _STAGES[stage](rows, chat, cutting, progress)
    kept = [i for i, item in enumerate(encoded.examples) if item.targets]
    useful = [encoded.examples[i] for i in kept]
    if not useful:
        cut = "no question fits" if stage in ONLINE else "does it cut every answer away?"
        hint = f"cutoff_len is {cutting.cutoff_len}: {cut}"
        raise BadData("No row has a token to learn.", field="cutoff_len", hint=hint)
    skipped = len(encoded.examples) - len(useful)
    return Encoded(useful, skipped, encoded.last_turn_only, kept)


@dataclass(frozen=True)
class Exchange:
    """A row to be answered: all up to its last answer, and that answer."""

    prompt: list[int]
    label: list[int]


def encode_questions(
    rows: Sequence[Conversation],
    chat: Chat,
    cutoff_len: int,
    *,
    progress: Progress = lambda _: None,
) -> list[Exchange]:
    """Rows as prompts and labels, together at most cutoff_len tokens.

    Source: behaviour of LLaMA-Factory 0.9.5, data/processor/unsupervised.py: one share for all
    that comes before the last answer, which keeps its start.
    """
    found = []
    for pieces, _ in _in_pieces(rows, chat, progress):
        asked, said = one_turn(pieces)
        kept, room = share(len(asked), len(said), cutoff_len)
        found.append(Exchange(asked[:kept], said[:room]))
    return found


def _conversations(
    rows: Sequence[Conversation], chat: Chat, cutting: Cutting, progress: Progress
) -> Encoded:
    """Stage sft: all answers of a row."""
    examples: list[Item] = []
    last_turn_only = 0
    for pieces, rewritten in _in_pieces(rows, chat, progress):
        last_turn_only += rewritten
        examples.append(cut(pieces, cutting))
    return Encoded(examples, last_turn_only=last_turn_only)


def _preferences(
    rows: Sequence[Preference], chat: Chat, cutting: Cutting, progress: Progress
) -> Encoded:
    """Stages dpo and rm: both answers share what is kept of the question."""
    sides = [side for row in rows for side in (row.chosen, row.rejected)]
    pieces = _in_pieces(sides, chat, lambda done: progress(done // 2))
    found: list[Item] = []
    for (chosen, _), (rejected, _) in zip(pieces, pieces, strict=True):
        asked, good = one_turn(chosen)
        _, bad = one_turn(rejected)
        kept, room = share(len(asked), max(len(good), len(bad)), cutting.cutoff_len)
        found.append(Pair(answer(asked[:kept], good[:room]), answer(asked[:kept], bad[:room])))
    return Encoded(found)


def _opinions(rows: Sequence[Opinion], chat: Chat, cutting: Cutting, progress: Progress) -> Encoded:
    """Stage kto. A row's mismatched answer is that of the row before it; the first has the last's.

    Source: behaviour of LLaMA-Factory 0.9.5, data/processor/feedback.py (there by 1,000 rows).
    """
    answered = [row.answered for row in rows]
    others = [
        replace(row, messages=[*row.asked, answered[i - 1].messages[-1]])
        for i, row in enumerate(answered)
    ]
    both = [side for pair in zip(answered, others, strict=True) for side in pair]
    pieces = _in_pieces(both, chat, lambda done: progress(done // 2))
    found: list[Item] = []
    for row, (own, _), (other, _) in zip(rows, pieces, pieces, strict=True):
        example, mismatched = (_cut_answer(each, cutting.cutoff_len) for each in (own, other))
        found.append(Labelled(example, mismatched, row.wanted))
    return Encoded(found)


def _questions(
    rows: Sequence[Unanswered], chat: Chat, cutting: Cutting, progress: Progress
) -> Encoded:
    """Stages grpo and rloo: questions as inference asks them, whole or not at all."""
    found: list[Item] = []
    for start in range(0, len(rows), ROWS_AT_ONCE):
        part = rows[start : start + ROWS_AT_ONCE]
        texts = [
            chat.render(
                chat.with_system(row.messages),
                generation_prompt=True,
                tools=row.tools,
                line=row.line,
            )
            for row in part
        ]
        for row, ids in zip(part, chat.encode(texts), strict=True):
            found.append(Question(ids if len(ids) <= cutting.cutoff_len else [], row))
        progress(start + len(part))
    return Encoded(found)


def encode_answers(rows: Sequence[Conversation], chat: Chat, cutoff_len: int) -> list[Example]:
    """The last answers of conversations, cut as stage rm cuts them."""
    pieces = _in_pieces(rows, chat, lambda done: None)
    return [_cut_answer(each, cutoff_len) for each, _ in pieces]


def _cut_answer(pieces: Sequence[Piece], cutoff_len: int) -> Example:
    asked, said = one_turn(pieces)
    kept, room = share(len(asked), len(said), cutoff_len)
    return answer(asked[:kept], said[:room])


def _texts(rows: Sequence[Text], chat: Chat, cutting: Cutting, progress: Progress) -> Encoded:
    """Stage pt: every token but a sequence's first is learned; each text ends with eos.

    It begins with what the tokenizer puts before a text. In blocks, texts follow one another and
    are cut every cutoff_len tokens; the rest is kept.
    Source: behaviour of LLaMA-Factory 0.9.5, data/processor/pretrain.py; there the rest is
    dropped, and a block's first token makes way for bos.
    """
    tokenizer, width = chat.tokenizer, cutting.cutoff_len
    begin = begin_of(chat)
    sequences: list[list[int]] = []
    flat: list[int] = []
    for start in range(0, len(rows), ROWS_AT_ONCE):
        texts = [row.text for row in rows[start : start + ROWS_AT_ONCE]]
        for ids in chat.encode(texts):
            whole = [*begin, *ids, tokenizer.eos_token_id]
            if cutting.blocks:
                flat += whole
            else:
                sequences.append(whole[:width])
        progress(min(start + ROWS_AT_ONCE, len(rows)))
    # A token that would be left alone at the end is nobody's target.
    sequences += [flat[start : start + width] for start in range(0, len(flat) - 1, width)]
    return Encoded([Example(ids, list(ids)) for ids in sequences])


def begin_of(chat: Chat) -> list[int]:
    """What the tokenizer puts before a plain text."""
    return list(chat.tokenizer.backend_tokenizer.encode("", add_special_tokens=True).ids)


_STAGES: Mapping[str, Callable[[Any, Chat, Cutting, Progress], Encoded]] = {
    "sft": _conversations,
    "pt": _texts,
    "rm": _preferences,
    "dpo": _preferences,
    "kto": _opinions,
    "grpo": _questions,
    "rloo": _questions,
}


def answer(asked: list[int], said: list[int]) -> Example:
    """A question that is given and an answer that is learned."""
    return Example(asked + said, [IGNORED] * len(asked) + said)


def one_turn(pieces: Sequence[Piece]) -> tuple[list[int], list[int]]:
    """All that stands before the last answer, and the answer."""
    before = [ids for source, target, _ in pieces[:-1] for ids in (source, target)]
    source, target, _ = pieces[-1]
    return [i for ids in (*before, source) for i in ids], target


def _in_pieces(
    rows: Sequence[Conversation], chat: Chat, progress: Progress
) -> Iterator[tuple[list[Piece], bool]]:
    """Each conversation's turns as token ids; whether only the last could be told apart."""
    for start in range(0, len(rows), ROWS_AT_ONCE):
        split = [_turns(each, chat) for each in rows[start : start + ROWS_AT_ONCE]]
        pieces = _encode_rows([turns for turns, _ in split], chat)
        for each, (_, rewritten) in zip(pieces, split, strict=True):
            yield each, rewritten
        progress(min(start + ROWS_AT_ONCE, len(rows)))


def _turns(conversation: Conversation, chat: Chat) -> tuple[list[Turn], bool]:
    """Split at each answer; whether only the last could be told apart from the rest.

    Some templates write earlier answers otherwise than the last one (they drop its reasoning):
    then the text up to the last question is all source.
    """
    messages = chat.with_system(conversation.messages)
    _check_calls(conversation, chat)
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    turns, written = [], ""
    for number, i in enumerate(answers):
        prompt, whole = _rendered(conversation, messages[: i + 1], chat)
        if not prompt.startswith(written):
            prompt, whole = _rendered(conversation, messages, chat)
            return [Turn(prompt, whole[len(prompt) :], conversation.trained[-1])], True
        trained = conversation.trained[number]
        turns.append(Turn(prompt[len(written) :], whole[len(prompt) :], trained))
        written = whole
    return turns, False


def _check_calls(conversation: Conversation, chat: Chat) -> None:
    """Refuse to learn empty answers where the template leaves out what they call."""
    calls = any(message.get("tool_calls") for message in conversation.messages)
    if calls and not chat.writes_calls:
        raise BadSpec(
            f"Line {conversation.line} calls a function, and the chat template writes no calls.",
            field="template",
            hint="set template to one that does: chatml, qwen, or jinja of your own",
        )


def _rendered(
    conversation: Conversation, messages: Sequence[Message], chat: Chat
) -> tuple[str, str]:
    """The text up to the last answer, and the text with it."""
    tools, line = conversation.tools, conversation.line
    prompt = chat.render(messages[:-1], generation_prompt=True, tools=tools, line=line, seams=True)
    whole = chat.render(messages, tools=tools, line=line, seams=True)
    if whole == prompt and messages[-1]["content"]:
        message = f"The chat template leaves the answer of line {line} out."
        hint = "set template to jinja that writes what the assistant says, or leave it out"
        raise BadSpec(message, field="template", hint=hint)
    if whole.startswith(prompt):
        return prompt, whole
    raise BadSpec(
        "The chat template does not write an answer where its generation prompt ends.",
        field="template",
        hint="set template to jinja that does",
    )


def _encode_rows(rows: list[list[Turn]], chat: Chat) -> Iterator[list[Piece]]:
    """Sources and targets are tokenised apart, as generating does: no token spans the border."""
    texts = [text for turns in rows for turn in turns for text in (turn.source, turn.target)]
    ids = iter(chat.encode(texts))
    for turns in rows:
        pieces: list[Piece] = []
        after: list[int] = []
        for turn in turns:
            source = after + next(ids)
            target, after = _closed(next(ids), chat)
            pieces.append((source, target, turn.trained))
        yield pieces


def _closed(target: list[int], chat: Chat) -> tuple[list[int], list[int]]:
    """An answer up to its closing token, and what the template writes after it.

    What follows ("\\n", mostly) is context of the next turn and no target: nobody generates it.
    Under a name of LLaMA-Factory's it is a target, as there.
    """
    if chat.closing_id is None:
        return [*target, chat.tokenizer.eos_token_id], []
    if chat.seamed:
        return target, []
    end = len(target) - 1
    while end >= 0 and target[end] not in chat.special_ids:
        end -= 1
    if end < 0:
        return [*target, chat.closing_id], []
    return target[: end + 1], target[end + 1 :]


def cut(pieces: Sequence[Piece], cutting: Cutting) -> Example:
    """Join the turns of a row within cutoff_len.

    With mask_history the last turn is served first and alone is trained; otherwise the first is
    served first. Source: behaviour of LLaMA-Factory 0.9.5, data/processor/supervised.py.
    """
    left = cutting.cutoff_len
    kept: list[tuple[list[int], list[int]]] = []
    for number, (source, target, trained) in enumerate(
        reversed(pieces) if cutting.mask_history else pieces
    ):
        if left <= 0:
            break
        source_len, target_len = share(len(source), len(target), left)
        left -= source_len + target_len
        ids = source[:source_len] + target[:target_len]
        learned = trained and not (cutting.mask_history and number)
        before = ids[:source_len] if cutting.train_on_prompt else [IGNORED] * source_len
        after = ids[source_len:] if learned else [IGNORED] * target_len
        kept.append((ids, before + after))
    if cutting.mask_history:
        kept.reverse()
    return Example([i for ids, _ in kept for i in ids], [i for _, row in kept for i in row])


def share(source_len: int, target_len: int, room: int) -> tuple[int, int]:
    """Divide ``room`` tokens between a source and its target; the shorter one keeps all.

    Source: behaviour of LLaMA-Factory 0.9.5, infer_seqlen in data/processor/processor_utils.py.

    >>> share(10, 10, 100), share(90, 10, 50), share(10, 90, 50), share(60, 60, 60)
    ((10, 10), (40, 10), (10, 40), (30, 30))
    """
    if target_len * 2 < room:
        target_room = room
    elif source_len * 2 < room:
        target_room = room - source_len
    else:
        target_room = int(room * (target_len / (source_len + target_len)))
    kept_target = min(target_room, target_len)
    return min(max(room - kept_target, 0), source_len), kept_target
