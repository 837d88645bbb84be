"""What a fine-tune says on the way and at last: watch-prompts, and predictions of held-out rows."""

from collections.abc import Mapping
from dataclasses import replace

from tuneyard.runners.asked import Asked
from tuneyard.runners.attempt import Attempt
from tuneyard.runners.base_model import ends_of
from tuneyard.runners.chat import Chat
from tuneyard.runners.data_files import data_file
from tuneyard.runners.examples import Exchange
from tuneyard.runners.generation import Speaker, undisturbed
from tuneyard.runners.predictions import (
    Predictions,
    held_out_of,
    predict,
    questions_of,
    settings_of,
    tell_progress,
)
from tuneyard.runners.results import as_json_lines
from tuneyard.runners.rows import read_conversations
from tuneyard.runners.training import Trainer
from tuneyard.runners.watching import WATCHED_FILE, Watch, encode_watched, watched_settings

_SHOWN = ("step", "prompt", "text")

PLAIN_STAGES = frozenset({"pt"})
"""Stages that learn text rather than turns of a chat."""


class Saying:
    """Both for one run, prepared before its first step: what is too long is known by then."""

    def __init__(
        self, asked: Asked, attempt: Attempt, chat: Chat, trainer: Trainer, *, rows: int
    ) -> None:
        """rows: how many of the data set have something to learn.

        Raises: BadSpec, BadData.
        """
        self._asked, self._attempt, self._trainer = asked, attempt, trainer
        arguments = asked.arguments
        self._stop_ids = chat.stop_ids(ends_of(asked.model))
        settings = watched_settings(
            max_new_tokens=arguments.watch_max_new_tokens, stop_ids=self._stop_ids
        )
        self._speaker = Speaker(trainer.running.model, chat, settings, trainer.give_way)
        if arguments.watch_prompts:
            encoded = encode_watched(
                arguments.watch_prompts,
                chat,
                plain=arguments.stage in PLAIN_STAGES,
                longest=self._speaker.limit,
            )
            trainer.watch = Watch(arguments.watch_prompts, encoded, self._speaker).answer
        self._questions = self._read_questions(chat, rows) if arguments.generates else []
        trainer.keeps_last = bool(self._questions)

    def _read_questions(self, chat: Chat, useful: int) -> list[Exchange]:
        arguments = self._asked.arguments
        separate = "eval_dataset" in self._attempt.spec.inputs
        name = "eval_dataset" if separate else "dataset"
        picked = arguments.eval_data_file if separate else arguments.data_file
        file = data_file(self._attempt.input(name), picked)
        rows = read_conversations(file, limit=arguments.max_samples)
        held = (
            rows
            if separate
            else held_out_of(
                rows,
                arguments,
                chat,
                val_size=arguments.val_size,
                seed=self._asked.seed,
                useful=useful,
            )
        )
        longest = self._speaker.limit
        return questions_of(held, chat, cutoff_len=arguments.cutoff_len, longest=longest)

    def predict(self) -> Predictions | None:
        """Answer the held-out rows, if that was asked for. Raises: Stopped.

        The trained model is kept first: whoever stops here has but to answer again.
        """
        if not self._questions:
            return None
        self._trainer.save()
        found = self._trainer.interruptible(self._predict)
        self._trainer.report_progress()
        step = self._trainer.at.step
        self._attempt.events.metric(step, **found.values(self.prefix))
        return found

    def _predict(self) -> Predictions:
        arguments, running = self._asked.arguments, self._trainer.running
        settings = settings_of(arguments, self._stop_ids, self._asked.seed)
        with undisturbed(running.model, running.device, running.casting()):
            return predict(
                self._questions,
                replace(self._speaker, settings=settings),
                batch_size=arguments.per_device_eval_batch_size,
                progress=tell_progress(self._attempt),
            )

    @property
    def prefix(self) -> str:
        """What the measures of predictions are called by, as LLaMA-Factory does."""
        return "predict" if self._asked.arguments.do_predict else "eval"

    def files(self, predictions: Predictions | None) -> Mapping[str, str]:
        """What the result holds of it all."""
        files = predictions.files if predictions else {}
        if self._trainer.watch is not None:
            # A checkpoint gives them back with their names in another order.
            answers = [{name: each[name] for name in _SHOWN} for each in self._trainer.at.answers]
            files[WATCHED_FILE] = as_json_lines(answers)
        return files
