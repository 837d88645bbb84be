"""From the rows of a fine-tune to its examples: tokenised here, or before by a prepare job."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuneyard.runners.attempt import Attempt
from tuneyard.runners.base_model import load_tokenizer, tokenizer_files
from tuneyard.runners.chat import Chat, chat_of
from tuneyard.runners.data_files import data_file
from tuneyard.runners.examples import Cutting, Encoded, Item, encode
from tuneyard.runners.rows import StageRow, read_stage
from tuneyard.runners.tokens import (
    HELD_OUT,
    TRAINING,
    TokenRows,
    digest_of,
    read_about,
    split_file,
)
from tuneyard.specs.fields import DATA_FILES
from tuneyard.specs.finetune import RowsSpec

SPLITS = {TRAINING: "dataset", HELD_OUT: "eval_dataset"}
"""Split -> the input whose rows it holds."""


@dataclass(frozen=True)
class Tokenised:
    """All items of a run. digest: of those to learn from."""

    examples: Sequence[Item]
    held_out: Sequence[Item]
    digest: str


def load_chat(model: Path, arguments: RowsSpec, attempt: Attempt) -> Chat:
    """The base's tokenizer, speaking through the template that was asked for."""
    wanted = arguments.template
    chat = chat_of(
        load_tokenizer(model),
        template=wanted,
        default_system=arguments.default_system,
        needed=arguments.stage != "pt",
    )
    if wanted and chat.name == "tokenizer":
        note = f"template {wanted!r}: the base brings its own chat template, which is used."
        attempt.events.warn("own_template", note)
    elif wanted and arguments.stage != "pt" and (foreign := chat.foreign_marks()):
        said = f"template {chat.name} writes {', '.join(foreign)}, no token of this model: it falls"
        hint = "leave template out, or name the one of the model's family"
        attempt.events.warn("foreign_template", f"{said} into pieces ({hint}).")
    return chat


def read_rows_of(attempt: Attempt, arguments: RowsSpec) -> Mapping[str, Sequence[StageRow]]:
    """The rows of each split that there is. Raises: BadData, InputGone."""
    picked = {TRAINING: arguments.data_file, HELD_OUT: arguments.eval_data_file}
    files = {
        split: data_file(attempt.input(name), picked[split], field=DATA_FILES[name])
        for split, name in SPLITS.items()
        if name in attempt.spec.inputs
    }
    limit = arguments.max_samples
    stage = arguments.stage
    return {split: read_stage(file, stage, limit=limit) for split, file in files.items()}


def encode_split(
    rows: Sequence[StageRow], arguments: RowsSpec, chat: Chat, attempt: Attempt
) -> Encoded:
    """Tokenise the rows of a split, with progress where it takes a while."""
    cutting = Cutting(
        arguments.tokens_kept,
        arguments.train_on_prompt,
        arguments.mask_history,
        blocks=arguments.packing is not False,
    )
    progress = _progress(attempt, len(rows))
    encoded = encode(rows, chat, cutting, stage=arguments.stage, progress=progress)
    for code, note in notes_on(encoded, len(rows)):
        attempt.events.warn(code, note)
    return encoded


def _progress(attempt: Attempt, total: int) -> Callable[[int], None]:
    def progress(done: int) -> None:
        if total > 1024:  # about a second
            attempt.events.emit("progress", done=done, total=total, unit="rows tokenised")

    return progress


def notes_on(encoded: Encoded, total: int) -> list[tuple[str, str]]:
    """What a person should know of how rows were cut."""
    notes = []
    if encoded.skipped:
        note = f"{encoded.skipped} of {total} rows teach nothing: cutoff_len cuts their answer."
        notes.append(("rows_skipped", note))
    if encoded.last_turn_only:
        note = f"The template rewrites earlier turns: of {encoded.last_turn_only} rows only the "
        notes.append(("last_turn_only", note + "last answer is trained."))
    return notes


def tokenise(
    rows: Mapping[str, Sequence[StageRow]],
    arguments: RowsSpec,
    chat: Chat,
    attempt: Attempt,
) -> Tokenised:
    """Tokenise all splits in memory."""
    found = {
        split: encode_split(each, arguments, chat, attempt).examples for split, each in rows.items()
    }
    return Tokenised(found[TRAINING], found.get(HELD_OUT, []), digest_of(found[TRAINING]))


def read_tokens(
    folder: Path, arguments: RowsSpec, model: Path, chat: Chat, attempt: Attempt
) -> Tokenised:
    """What a prepare job left. Raises: BadSpec when it was made for something else."""
    about = read_about(folder, made_from(arguments, model, chat))
    for code, note in about["notes"]:
        attempt.events.warn(code, note)
    held_out = split_file(folder, HELD_OUT)
    return Tokenised(
        TokenRows(split_file(folder, TRAINING)),
        TokenRows(held_out) if held_out.exists() else [],
        about["digest"],
    )


def made_from(arguments: RowsSpec, model: Path, chat: Chat) -> dict[str, Any]:
    """All that decides about tokens but the rows themselves."""
    digest = hashlib.sha256()
    for file in tokenizer_files(model):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return {
        "stage": arguments.stage,
        "packing": arguments.packing,
        "template": chat.template,
        "seamed": chat.seamed,
        "default_system": arguments.default_system,
        "cutoff_len": arguments.tokens_kept,
        "train_on_prompt": arguments.train_on_prompt,
        "mask_history": arguments.mask_history,
        "max_samples": arguments.max_samples,
        "tokenizer": digest.hexdigest(),
    }
