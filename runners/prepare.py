"""Turn rows into tokens:  python -P -m tuneyard.runners.prepare SPEC.json WORKDIR

inputs: model (a folder), dataset (a file), eval_dataset (a file, optional). arguments: those of
PrepareArguments. output: a folder of tokens as runners/tokens.py describes it. No torch.
"""

import json

from tuneyard.runners.arguments import PrepareArguments, arguments_of
from tuneyard.runners.attempt import Attempt, main
from tuneyard.runners.base_model import read_config
from tuneyard.runners.tokenising import (
    encode_split,
    load_chat,
    made_from,
    notes_on,
    read_rows_of,
)
from tuneyard.runners.tokens import ABOUT_FILE, TRAINING, RowWriter, digest_of, split_file
from tuneyard.store.folder import publish_folder


def prepare(attempt: Attempt) -> None:
    """Read, tokenise, publish."""
    arguments = arguments_of(attempt, PrepareArguments)
    model = attempt.input("model")
    read_config(model)
    rows = read_rows_of(attempt, arguments)
    attempt.begin()
    chat = load_chat(model, arguments, attempt)
    aside = attempt.fresh_aside()
    about: dict[str, object] = {"made_from": made_from(arguments, model, chat)}
    notes: list[tuple[str, str]] = []
    values: dict[str, int] = {}
    for split, conversations in rows.items():
        encoded = encode_split(conversations, arguments, chat, attempt)
        writer = RowWriter()
        writer.add(encoded.examples)
        writer.write(split_file(aside, split))
        notes += notes_on(encoded, len(conversations))
        values |= {f"{split}_rows": len(encoded.examples), f"{split}_tokens": writer.tokens}
        if split == TRAINING:
            about["digest"] = digest_of(encoded.examples)
    about |= {"notes": notes, **values}
    text = json.dumps(about, indent=1, sort_keys=True)
    (aside / ABOUT_FILE).write_text(text + "\n", encoding="utf-8")
    publish_folder(aside, attempt.output, {"kind": "tokens"})
    attempt.events.emit("result", values=values)


if __name__ == "__main__":
    main(prepare)
