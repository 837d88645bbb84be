"""Answer prompts:  python -P -m tuneyard.runners.infer SPEC.json WORKDIR

inputs: model (a folder), adapter (a folder, optional), prompts (a file). arguments: those of
InferArguments. output: results.jsonl, a line per prompt in the order they were asked.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuneyard.runners.arguments import InferArguments, arguments_of
from tuneyard.runners.attempt import Attempt, main
from tuneyard.runners.base_model import (
    ends_of,
    load_tokenizer,
    read_config,
    read_generation_config,
)
from tuneyard.runners.chat import Chat, chat_of
from tuneyard.runners.devices import make_ready
from tuneyard.runners.failures import Stopped
from tuneyard.runners.origin import read_adapter_config, read_origin
from tuneyard.runners.peft_import import import_peft
from tuneyard.runners.prompts import Prompt, prompts_of, read_prompts
from tuneyard.runners.results import (
    RESULTS_FILE,
    Results,
    key_of,
    read_results,
    save_results,
    write_results,
)
from tuneyard.runners.retention import RESUME_POINT_S
from tuneyard.store.folder import publish_folder

if TYPE_CHECKING:
    from tuneyard.runners.generation import Settings, Speaker


@dataclass(frozen=True)
class Asked:
    """What the spec asks for, read and checked without torch."""

    arguments: InferArguments
    seed: int
    model: Path
    config: Mapping[str, Any]
    adapter: Path | None
    origin: Mapping[str, Any]
    prompts: Sequence[Prompt]


def infer(attempt: Attempt) -> None:
    """Check, load, answer, publish."""
    asked = read_asked(attempt)
    attempt.events.emit("phase", phase="loading")
    make_ready(attempt.device)
    chat = load_chat(asked)
    settings = settings_of(asked, chat)
    speaker = load_speaker(asked, attempt, chat, settings)
    attempt.begin()
    results = answer_all(asked, attempt, speaker)
    publish(asked, attempt, settings, results)


def read_asked(attempt: Attempt) -> Asked:
    """Read arguments, configuration and prompts. Raises: BadSpec, BadData, InputGone."""
    arguments = arguments_of(attempt, InferArguments)
    if "prompts" in attempt.spec.inputs:
        prompts = read_prompts(attempt.input("prompts"), system=arguments.system)
    else:
        listed = arguments.prompts if isinstance(arguments.prompts, list) else []
        given = list(enumerate(listed, start=1))
        prompts = prompts_of(given, system=arguments.system)
    return ask_of(attempt, arguments, prompts)


def ask_of(attempt: Attempt, arguments: InferArguments, prompts: Sequence[Prompt]) -> Asked:
    """The weights that the spec names, and what trained them. Raises: BadSpec, InputGone."""
    model = attempt.input("model")
    adapter = attempt.input("adapter") if "adapter" in attempt.spec.inputs else None
    if adapter is not None:
        read_adapter_config(adapter)
    origin = read_origin(adapter or model)
    seed = attempt.spec.seed if arguments.seed is None else arguments.seed
    return Asked(arguments, seed, model, read_config(model), adapter, origin, prompts)


def load_chat(asked: Asked) -> Chat:
    """The tokenizer and the template that adapter or model was trained with, else its own."""
    tokenizer = load_tokenizer(asked.model)
    trained = asked.origin.get("template")
    return chat_of(
        tokenizer,
        template=asked.arguments.template or trained,
        default_system=asked.origin.get("default_system"),
    )


def settings_of(asked: Asked, chat: Chat) -> "Settings":
    """What applies to this job."""
    from tuneyard.runners.generation import choose_settings

    says, ends = read_generation_config(asked.model), stop_ids(asked, chat)
    return choose_settings(asked.arguments, says, stop_ids=ends, seed=asked.seed)


def stop_ids(asked: Asked, chat: Chat) -> list[int]:
    """All that ends a turn: of the base, of what trained, of the template."""
    return chat.stop_ids([*ends_of(asked.model), *asked.origin.get("stop_token_ids", ())])


def load_speaker(asked: Asked, attempt: Attempt, chat: Chat, settings: "Settings") -> "Speaker":
    """Load the weights, and the adapter onto them."""
    import torch

    from tuneyard.runners.base_model import load_weights
    from tuneyard.runners.generation import Speaker
    from tuneyard.runners.precision import precision_of

    device = attempt.device.torch_name
    precision = precision_of(asked.config, device, asked.arguments.precision)
    dtype = getattr(torch, precision.weights)
    model = load_weights(asked.model, asked.config, dtype=dtype, device=device)
    if asked.adapter is not None:
        import_peft(attempt)
        from tuneyard.runners.learned import load_adapter

        model = load_adapter(model, asked.adapter)
    model.eval()

    def give_way() -> None:
        if attempt.stops.stop_asked:
            raise _Interrupted

    return Speaker(model, chat, settings, give_way)


class _Interrupted(Exception):
    """SIGTERM came while a batch was being answered."""


def answer_all(asked: Asked, attempt: Attempt, speaker: "Speaker") -> Results:
    """Answer batch by batch, longest prompts first, keeping what is done. Raises: Stopped."""
    encoded = speaker.chat.encode([_text(p, speaker.chat) for p in asked.prompts])
    batches = grouped(encoded, asked.arguments.batch_size)
    key = key_of([asked.arguments.model_dump(), asked.seed, [p.shown for p in asked.prompts]])
    results = read_results(attempt, key)
    progress = Pace(attempt, len(asked.prompts), done=len(results))
    attempt.stops.defer()
    try:
        for number, batch in enumerate(batches):
            if any(i not in results for i in batch):
                results |= _answer(asked, speaker, encoded, batch, number)
            progress.report(len(results))
            if progress.checkpoint_due() and len(results) < len(asked.prompts):
                save_results(attempt, results, key)
    except _Interrupted:
        if results:
            save_results(attempt, results, key)
        raise Stopped(at_checkpoint=bool(results)) from None
    return results


def _text(prompt: Prompt, chat: Chat) -> str:
    return chat.render(chat.with_system(prompt.messages), generation_prompt=True)


def grouped(encoded: Sequence[Sequence[int]], size: int) -> list[list[int]]:
    """Places of the prompts in batches of like length; the longest first, where memory ends.

    >>> grouped([[1], [1, 2, 3], [1, 2]], 2)
    [[1, 2], [0]]
    """
    places = sorted(range(len(encoded)), key=lambda i: (-len(encoded[i]), i))
    return [places[start : start + size] for start in range(0, len(places), size)]


def _answer(
    asked: Asked,
    speaker: "Speaker",
    encoded: Sequence[Sequence[int]],
    batch: Sequence[int],
    number: int,
) -> Results:
    answers = speaker.answer([encoded[i] for i in batch], batch=number)
    return {
        i: {"index": i, **asked.prompts[i].shown, **asdict(answer)}
        for i, answer in zip(batch, answers, strict=True)
    }


class Pace:
    """How fast it goes, and when a resume point is due."""

    def __init__(self, attempt: Attempt, total: int, *, done: int) -> None:
        self.attempt, self.total, self.before = attempt, total, done
        self.began = self.saved_at = time.monotonic()

    def report(self, done: int) -> None:
        """Emit a progress event."""
        passed, fresh = time.monotonic() - self.began, done - self.before
        eta_s = round(passed / fresh * (self.total - done), 1) if fresh else None
        self.attempt.events.emit(
            "progress", done=done, total=self.total, unit="prompts", eta_s=eta_s
        )

    def checkpoint_due(self) -> bool:
        """Asked for by signal, or the last one is too old."""
        asked = self.attempt.stops.take_checkpoint_asked()
        due = asked or time.monotonic() - self.saved_at > RESUME_POINT_S
        if due:
            self.saved_at = time.monotonic()
        return due


def publish(asked: Asked, attempt: Attempt, settings: "Settings", results: Results) -> None:
    """Write output/results.jsonl, and say what applied."""
    aside = attempt.fresh_aside()
    write_results(aside / RESULTS_FILE, results)
    applied = {**asdict(settings), "batch_size": asked.arguments.batch_size}
    ids = attempt.spec.input_ids
    meta = {"kind": "results", "settings": applied, "inputs": dict(ids)}
    publish_folder(aside, attempt.output, meta)
    values = {
        "prompts": len(results),
        "prompt_tokens": sum(row["prompt_tokens"] for row in results.values()),
        "completion_tokens": sum(row["completion_tokens"] for row in results.values()),
        "settings": applied,
    }
    attempt.events.emit("result", values=values)


if __name__ == "__main__":
    main(infer)
