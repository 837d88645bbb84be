"""What a fine-tune leaves: an adapter in peft's format with all that it needs, or a whole model."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tuneyard.runners.asked import Asked, adapter_names
from tuneyard.runners.attempt import Attempt, library_versions
from tuneyard.runners.base_model import ends_of, tokenizer_files
from tuneyard.runners.chat import Chat
from tuneyard.runners.checkpoint import LOG_FILE, Position, write_log
from tuneyard.runners.learned import is_adapter, save_adapter
from tuneyard.runners.origin import WEIGHTS_FILE, published_digest
from tuneyard.runners.results import write_texts
from tuneyard.runners.run_files import write_run_files
from tuneyard.runners.tensor_files import SINGLE_FILE
from tuneyard.runners.training import Trainer
from tuneyard.runners.tuned_folder import write_tuned
from tuneyard.specs.runner import TUNEYARD_FILE
from tuneyard.store.folder import publish_folder


def publish_tuned(
    asked: Asked,
    attempt: Attempt,
    chat: Chat,
    trainer: Trainer,
    *,
    beside: Mapping[str, str] | None = None,
    measured: Mapping[str, float] | None = None,
) -> None:
    """Write output/: the adapter or model, what it needs to speak, and how it came about.

    beside: more files, by name; measured: more values for the ``result`` event.
    """
    position, model = trainer.at, trainer.running.model
    aside = attempt.fresh_aside()
    about = origin(asked, attempt, chat, position) | {"steps": trainer.loaded_step or position.step}
    if (reference := getattr(trainer.objective, "reference", None)) is not None:
        about["reference"] = reference.said
    meta: dict[str, Any] = {"base": asked.base_id, "steps": position.step}
    if is_adapter(model):
        save_adapter(model, aside, base_id=asked.base_id)
        copy_tokenizer(asked.model, aside, chat)
        meta |= {"kind": "adapter"}
    else:
        write_tuned(model, asked.model, aside, config=asked.config, origin=about)
        lineage = {"base": about["base"], "job": attempt.spec.job}
        meta |= {"kind": "model", "lineage": lineage}
    write_log(aside / LOG_FILE, position.log)
    write_texts(aside, beside or {})
    write_run_files(aside, asked, attempt, trainer, measured=measured or {})
    text = json.dumps(about, indent=1, sort_keys=True)
    (aside / TUNEYARD_FILE).write_text(text + "\n", encoding="utf-8")
    manifest = publish_folder(aside, attempt.output, meta)
    digests = {entry["path"]: entry["sha256"] for entry in manifest["files"]}
    values = {**came_to(trainer, digests), **(measured or {})}
    attempt.events.emit("result", values={k: v for k, v in values.items() if v is not None})


def came_to(trainer: Trainer, digests: Mapping[str, str]) -> dict[str, Any]:
    """What the ``result`` event says of a run; None: there was no such thing."""
    position = trainer.at
    return {
        "loss": position.loss_sum / max(1, position.step),
        "steps": position.step,
        "tokens": position.tokens,
        "adapter_sha256": digests.get(WEIGHTS_FILE),
        "model_sha256": digests.get(SINGLE_FILE),
        "eval_loss": position.best_loss,
        "best_step": position.best_step,
        "skipped_steps": position.skipped_steps,
        "stopped_early": trainer.stopped_early or None,
        "loaded_step": trainer.loaded_step,
        "last_loss": next(
            (line["loss"] for line in reversed(position.log) if "loss" in line), None
        ),
    }


def copy_tokenizer(model: Path, folder: Path, chat: Chat) -> None:
    """The base's tokenizer, byte for byte, with the template that trained."""
    for file in tokenizer_files(model):
        shutil.copyfile(file, folder / file.name)
    if chat.name != "tokenizer":
        (folder / "chat_template.jinja").write_text(chat.template, encoding="utf-8")


def origin(asked: Asked, attempt: Attempt, chat: Chat, position: Position) -> dict[str, Any]:
    """tuneyard.json: what inference, chat and merge of this adapter go by. No times, no paths."""
    stop_ids = chat.stop_ids(ends_of(asked.model))
    return {
        "format": 1,
        "base": {"id": asked.base_id, "digest": published_digest(asked.model)},
        "dataset": attempt.spec.input_ids.get("dataset"),
        "adapters": [attempt.spec.input_ids.get(n) for n in adapter_names(attempt.spec.inputs)],
        "template": chat.template or None,
        "template_name": chat.name,
        "default_system": chat.default_system,
        "stop_token_ids": stop_ids,
        "stop_tokens": chat.tokenizer.convert_ids_to_tokens(stop_ids),
        "arguments": asked.arguments.of_the_runner(),
        "seed": asked.seed,
        "steps": position.step,
        "versions": dict(library_versions()),
    }
