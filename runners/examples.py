"""Conversations as token ids and labels: turn by turn, cut as LLaMA-Factory cuts.

Labels are set by position, never by token id: where pad is eos, the end of a turn stays a target.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from tuneyard.runners.chat import Chat
from tuneyard.runners.failures import BadData, BadSpec
from tuneyard.runners.rows import Conversation, Message

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
class Cutting:
    """Which tokens are kept and which are targets."""

    cutoff_len: int = 2048
    train_on_prompt: bool = False
    mask_history: bool = False


@dataclass(frozen=True)
class Turn:
    """What stands before an answer, and the answer with what closes it."""

    source: str
    target: str
    trained: bool


@dataclass(frozen=True)
class Encoded:
    """All examples that teach something, and how many rows did not or only in part."""

    examples: list[Example]
    skipped: int
    last_turn_only: int


def encode_conversations(
    conversations: Sequence[Conversation],
    chat: Chat,
    cutting: Cutting,
    *,
    progress: Callable[[int], None] = lambda done: None,
) -> Encoded:
    """Tokenise all rows. Raises: BadData when the template refuses one or nothing is left."""
    examples: list[Example] = []
    last_turn_only = 0
    for start in range(0, len(conversations), ROWS_AT_ONCE):
        rows = [_turns(each, chat) for each in conversations[start : start + ROWS_AT_ONCE]]
        last_turn_only += sum(rewritten for _, rewritten in rows)
        examples += _encode_rows([turns for turns, _ in rows], chat, cutting)
        progress(min(start + ROWS_AT_ONCE, len(conversations)))
    useful = [example for example in examples if example.targets]
    if not useful:
        raise BadData(
            "No row has a token to learn.",
            hint=f"cutoff_len is {cutting.cutoff_len}: does it cut every answer away?",
        )
    return Encoded(useful, len(examples) - len(useful), last_turn_only)


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
    prompt = chat.render(messages[:-1], generation_prompt=True, tools=tools, line=line)
    whole = chat.render(messages, tools=tools, line=line)
    if whole.startswith(prompt):
        return prompt, whole
    raise BadSpec(
        "The chat template does not write an answer where its generation prompt ends.",
        field="template",
        hint="set template to jinja that does",
    )


def _encode_rows(rows: list[list[Turn]], chat: Chat, cutting: Cutting) -> Iterator[Example]:
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
        yield cut(pieces, cutting)


def _closed(target: list[int], chat: Chat) -> tuple[list[int], list[int]]:
    """An answer up to its closing token, and what the template writes after it.

    What follows ("\\n", mostly) is context of the next turn and no target: nobody generates it.
    Under a name of LLaMA-Factory's it is a target, as there.
    """
    if chat.closing_id is None:
        return [*target, chat.tokenizer.eos_token_id], []
    if chat.whole_turns:
        return target, []
    end = len(target) - 1
    while end >= 0 and target[end] not in chat.special_ids:
        end -= 1
    if end < 0:
        return [*target, chat.closing_id], []
    return target[: end + 1], target[end + 1 :]


Piece = tuple[list[int], list[int], bool]
"""Source ids, target ids, whether the target is trained."""


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
