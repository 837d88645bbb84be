"""Keep a model loaded and answer questions:  python -P -m tuneyard.runners.serve SPEC.json WORKDIR

inputs: model (a folder), adapter (a folder, optional). arguments: those of ServeArguments. It
listens on WORKDIR/serve.sock (door.py has the protocol) once it says phase ``running``, answers
one question at a time, and ends with exit code 0 when nobody asked for ``idle_s`` or it was told
to drain. SIGTERM breaks off what is being answered, says so to who asked, and ends with 76: the
client holds the conversation, so nothing has to be kept. What is said is written nowhere.
"""

import logging
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from tuneyard.runners.arguments import InferArguments, ServeArguments, arguments_of, read_arguments
from tuneyard.runners.attempt import Attempt, main
from tuneyard.runners.base_model import read_generation_config
from tuneyard.runners.deltas import Deltas
from tuneyard.runners.desk import Desk, Question
from tuneyard.runners.devices import make_ready
from tuneyard.runners.door import Door
from tuneyard.runners.failures import BadData, RunnerError, Stopped, diagnose
from tuneyard.runners.infer import Asked, ask_of, load_chat, load_speaker, settings_of
from tuneyard.specs.conversations import check_prompt
from tuneyard.specs.exits import Cause
from tuneyard.specs.serve import ChatRequest

if TYPE_CHECKING:
    from tuneyard.runners.generation import Answer, Settings, Speaker

log = logging.getLogger(__name__)

LOOK_EVERY_S = 0.25
HEARTBEAT_EVERY_S = 30.0
"""A runner that writes nothing for long is taken for stuck; this one may wait for hours."""

TELL_EVERY_S = 0.02
DECODING_SHARE = 10
"""A growing text is decoded anew for each piece: at most a tenth of the time goes there."""

LEAVE_WITHIN_S = 2.0
OF_A_QUESTION = frozenset(ChatRequest.model_fields) - {"messages", "stream"}


def serve(attempt: Attempt) -> None:
    """Check, load, listen, answer until nobody asks any more. Raises: Stopped."""
    arguments = arguments_of(attempt, ServeArguments)
    asked = ask_of(attempt, arguments, ())
    attempt.events.emit("phase", phase="loading")
    make_ready(attempt.device)
    host = load_host(asked, arguments, attempt)
    attempt.stops.defer()
    door = Door(attempt.workdir, ask=host.ask, drain=host.desk.close)
    door.start()
    attempt.begin()
    try:
        ended_by = host.answer_all()
    finally:
        door.finish(within_s=LEAVE_WITHIN_S)
    attempt.events.emit("result", values=asdict(host.tally) | {"ended_by": ended_by})


def load_host(asked: Asked, arguments: ServeArguments, attempt: Attempt) -> "Host":
    """Load tokenizer, weights and adapter, as an inference job does."""
    chat = load_chat(asked)
    if arguments.default_system is not None:
        chat = replace(chat, default_system=arguments.default_system)
    speaker = load_speaker(asked, attempt, chat, settings_of(asked, chat))
    return Host(read_generation_config(asked.model), arguments, attempt, speaker)


class _Left(Exception):
    """Nobody waits for this answer any more."""


class _Interrupted(Exception):
    """SIGTERM came."""


@dataclass
class Tally:
    """What was answered so far."""

    answers: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass
class Host:
    """A loaded model behind a desk; ``ask`` is called from any thread, the rest from one.

    model_says: its generation_config.json.
    """

    model_says: Mapping[str, Any]
    arguments: ServeArguments
    attempt: Attempt
    speaker: "Speaker"
    desk: Desk = field(default_factory=Desk)
    tally: Tally = field(default_factory=Tally)
    _beaten_at: float = field(default_factory=time.monotonic)

    # In the asker's thread ----------------------------------------------------------------------

    def ask(self, document: Mapping[str, Any]) -> tuple[Question, int]:
        """Put a question in line, and say how many are before it. Raises: BadData, Busy, Ended."""
        prompt = self._prompt(document)
        question = Question(prompt, self._settings(document))
        return question, self.desk.put(question)

    def _prompt(self, document: Mapping[str, Any]) -> Sequence[int]:
        messages: list[Mapping[str, Any]] = document.get("messages") or []
        check_prompt({"messages": messages})
        chat = self.speaker.chat
        text = chat.render(chat.with_system(messages), generation_prompt=True)
        (ids,) = chat.encode([text])
        if len(ids) >= self.speaker.limit:
            raise BadData(
                f"The conversation has {len(ids)} tokens; the model reads {self.speaker.limit}"
                " with its answer.",
                code="context_too_long",
                field="messages",
                hint="begin anew, or leave out its oldest turns",
            )
        return ids

    def _settings(self, document: Mapping[str, Any]) -> "Settings":
        """What the question asks for, then the job, then the model's files, then OpenAI."""
        from tuneyard.runners.generation import choose_settings

        said = {name: document[name] for name in OF_A_QUESTION if document.get(name) is not None}
        if "temperature" in said:
            said.setdefault("do_sample", None)
        chosen, _ = read_arguments(InferArguments, self.arguments.model_dump() | said)
        seed = secrets.randbelow(2**32) if chosen.seed is None else chosen.seed
        stop_ids = self.speaker.settings.stop_ids
        return choose_settings(chosen, self.model_says, stop_ids=stop_ids, seed=seed)

    # In the answering thread --------------------------------------------------------------------

    def answer_all(self) -> str:
        """Answer one after the other; returns why it ended: idle or drained. Raises: Stopped."""
        self._report()
        while True:
            question = self.desk.take(within_s=LOOK_EVERY_S)
            if self.attempt.stops.stop_asked:
                self._stop(question)
            if question is not None:
                self._answer(question)
            elif self.desk.drained:
                return "drained"
            elif self.desk.close_if_idle(self.arguments.idle_s):
                return "idle"
            elif time.monotonic() - self._beaten_at > HEARTBEAT_EVERY_S:
                self._report()

    def _answer(self, question: Question) -> None:
        telling = _Telling(self.speaker, question)
        try:
            (answer,) = replace(
                self.speaker,
                settings=question.settings,
                give_way=lambda: self._give_way(question),
                heard=telling.hear,
            ).answer([question.prompt], batch=0)
        except _Left:
            log.info("a question was taken back")
        except _Interrupted:
            self._stop(question)
        except Exception as error:
            self._fail(question, error)
        else:
            self._note(answer, telling)
            telling.end(answer)

    def _give_way(self, question: Question) -> None:
        if self.attempt.stops.stop_asked:
            raise _Interrupted
        if question.gone.is_set():
            raise _Left
        if time.monotonic() - self._beaten_at > HEARTBEAT_EVERY_S:
            self._report()

    def _stop(self, question: Question | None) -> None:
        """Tell all who wait that they must ask elsewhere. Raises: Stopped."""
        waiting = self.desk.close()
        for each in [question, *waiting]:
            if each is not None:
                stopping = RunnerError("The model is being stopped.", code="stopping")
                each.tell(error=stopping.as_dict())
        raise Stopped(at_checkpoint=False)

    def _fail(self, question: Question, error: Exception) -> None:
        """One question that cannot be answered takes no others along, unless the device is gone."""
        failure = diagnose(error, {})
        if failure.cause == Cause.DEVICE_LOST or "CUDA error" in failure.evidence:
            broken = RunnerError("The device failed.", code="stopping")
            question.tell(error=broken.as_dict())
            raise error
        log.warning("a question was not answered", exc_info=error)
        hint = None
        if failure.cause == Cause.OUT_OF_MEMORY:
            _free_memory()
            hint = "shorten the conversation, or ask for fewer tokens"
        failed = RunnerError(failure.evidence[:500], code=failure.cause.value, hint=hint)
        question.tell(error=failed.as_dict())

    def _note(self, answer: "Answer", telling: "_Telling") -> None:
        self.tally.answers += 1
        self.tally.prompt_tokens += answer.prompt_tokens
        self.tally.completion_tokens += answer.completion_tokens
        took_s = max(time.monotonic() - telling.began, 1e-6)
        values = {
            "prompt_tokens": float(answer.prompt_tokens),
            "completion_tokens": float(answer.completion_tokens),
            "first_token_s": round(telling.first_s or took_s, 4),
            "tokens_per_s": round(answer.completion_tokens / took_s, 2),
        }
        self.attempt.events.metric(self.tally.answers, **values)
        self._report()

    def _report(self) -> None:
        self._beaten_at = time.monotonic()
        self.attempt.events.emit("progress", done=self.tally.answers, unit="answers")


class _Telling:
    """An answer on its way out, in pieces of whole characters, one each 20 ms at most."""

    def __init__(self, speaker: "Speaker", question: Question) -> None:
        self._speaker = replace(speaker, settings=question.settings)
        self._question = question
        self._deltas = Deltas(question.settings.stop)
        self._next_at = 0.0
        self.began = time.monotonic()
        self.first_s: float | None = None

    def hear(self, row: Sequence[int]) -> None:
        """Another token was said."""
        now = time.monotonic()
        if self.first_s is None:
            self.first_s = now - self.began
        if now >= self._next_at:
            self._tell(self._deltas.more(self._speaker.text_of(row)))
            took_s = time.monotonic() - now
            self._next_at = now + max(TELL_EVERY_S, DECODING_SHARE * took_s)

    def end(self, answer: "Answer") -> None:
        """The rest, and how it came about."""
        self._tell(self._deltas.rest(answer.text))
        usage = {
            "prompt_tokens": answer.prompt_tokens,
            "completion_tokens": answer.completion_tokens,
        }
        settings = asdict(self._question.settings)
        self._question.tell(
            done=True, finish_reason=answer.finish_reason, usage=usage, settings=settings
        )

    def _tell(self, delta: str) -> None:
        if delta:
            self._question.tell(delta=delta)


def _free_memory() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main(serve)
