"""Fine-tune a base by LoRA:  python -P -m tuneyard.runners.finetune SPEC.json WORKDIR

inputs: model (a folder), dataset (a file), eval_dataset (a file, optional). arguments: those of
FinetuneArguments. output: the adapter in peft's format, the tokenizer, tuneyard.json.
"""

from collections.abc import Sequence

from tuneyard.runners.asked import Asked, read_asked
from tuneyard.runners.attempt import Attempt, main
from tuneyard.runners.base_model import load_tokenizer
from tuneyard.runners.chat import Chat, chat_of
from tuneyard.runners.devices import make_ready
from tuneyard.runners.examples import Cutting, Encoded, Example, encode_conversations
from tuneyard.runners.rows import Conversation


def finetune(attempt: Attempt) -> None:
    """Check, load, train, publish."""
    asked = read_asked(attempt)
    attempt.events.emit("phase", phase="loading")
    make_ready(attempt.device)
    # Not before the data are known to be good: torch and transformers take seconds to import.
    from tuneyard.runners.adapter_folder import publish_adapter
    from tuneyard.runners.assembly import build_trainer

    chat = load_chat(asked, attempt)
    encoded, held_out = encode(asked, chat, attempt)
    trainer = build_trainer(asked, attempt, chat, encoded, held_out)
    attempt.events.emit("phase", phase="running")
    trainer.train()
    publish_adapter(asked, attempt, chat, trainer)


def load_chat(asked: Asked, attempt: Attempt) -> Chat:
    """The base's tokenizer, speaking through the template that was asked for."""
    wanted = asked.arguments.template
    chat = chat_of(
        load_tokenizer(asked.model), template=wanted, default_system=asked.arguments.default_system
    )
    if wanted and chat.name == "tokenizer":
        note = f"template {wanted!r}: the base brings its own chat template, which is used."
        attempt.events.warn("own_template", note)
    return chat


def encode(asked: Asked, chat: Chat, attempt: Attempt) -> tuple[list[Example], list[Example]]:
    """Tokenise, and set aside what is only measured on."""
    from tuneyard.runners.batches import split

    encoded = _encode(asked.conversations, asked, chat, attempt)
    if asked.held_out:
        return encoded.examples, _encode(asked.held_out, asked, chat, attempt).examples
    return split(encoded.examples, asked.arguments.val_size, seed=asked.seed)


def _encode(
    conversations: Sequence[Conversation], asked: Asked, chat: Chat, attempt: Attempt
) -> Encoded:
    arguments, total = asked.arguments, len(conversations)
    cutting = Cutting(arguments.cutoff_len, arguments.train_on_prompt, arguments.mask_history)

    def progress(done: int) -> None:
        if total > 1024:  # about a second
            attempt.events.emit("progress", done=done, total=total, unit="rows tokenised")

    encoded = encode_conversations(conversations, chat, cutting, progress=progress)
    if encoded.skipped:
        note = f"{encoded.skipped} of {total} rows teach nothing: cutoff_len cuts their answer."
        attempt.events.warn("rows_skipped", note)
    if encoded.last_turn_only:
        note = f"The template rewrites earlier turns: of {encoded.last_turn_only} rows only the "
        attempt.events.warn("last_turn_only", note + "last answer is trained.")
    return encoded


if __name__ == "__main__":
    main(finetune)
