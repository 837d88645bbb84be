"""Held-out rows answered by a model, and how near the answers come.

generated_predictions.jsonl has LLaMA-Factory's form: prompt (with special tokens), predict, label.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tuneyard.runners.attempt import Attempt
from tuneyard.runners.batches import split
from tuneyard.runners.chat import Chat
from tuneyard.runners.examples import Cutting, Exchange, encode, encode_questions
from tuneyard.runners.failures import BadData
from tuneyard.runners.generation import Settings, Speaker
from tuneyard.runners.infer import grouped
from tuneyard.runners.results import as_json_lines
from tuneyard.runners.rows import Conversation
from tuneyard.runners.similarity import mean_scores, scores
from tuneyard.specs.finetune import RowsSpec
from tuneyard.specs.predicting import PredictingFields

PREDICTIONS_FILE = "generated_predictions.jsonl"


@dataclass(frozen=True)
class Predictions:
    """What was said of each row, and the means over all."""

    lines: Sequence[Mapping[str, str]]
    means: Mapping[str, float]

    def values(self, prefix: str) -> dict[str, float]:
        """The means as metrics: predict_bleu-4, predict_rouge-1, …"""
        return {f"{prefix}_{name}": value for name, value in sorted(self.means.items())}

    @property
    def files(self) -> dict[str, str]:
        """File name -> content, as LLaMA-Factory leaves it."""
        return {PREDICTIONS_FILE: as_json_lines(self.lines)}


def held_out_of(
    rows: Sequence[Conversation],
    arguments: RowsSpec,
    chat: Chat,
    *,
    val_size: float,
    seed: int,
    useful: int | None = None,
) -> Sequence[Conversation]:
    """The rows that a fine-tune with this val_size and seed does not learn.

    useful: how many rows have a token to learn, where that is known: the division is over those.
    """  # fmt: skip
    if useful != len(rows):
        cutting = Cutting(arguments.tokens_kept, arguments.train_on_prompt, arguments.mask_history)
        rows = [rows[i] for i in encode(rows, chat, cutting).kept]
    return list(split(rows, val_size, seed=seed)[1])


def questions_of(
    rows: Sequence[Conversation], chat: Chat, *, cutoff_len: int, longest: int
) -> list[Exchange]:
    """Rows as prompts and labels. Raises: BadData where a prompt leaves no room for an answer."""
    questions = encode_questions(rows, chat, cutoff_len)
    for row, question in zip(rows, questions, strict=True):
        if len(question.prompt) >= longest:
            raise BadData(
                f"A row to predict has a prompt of {len(question.prompt)} tokens; the model reads "
                f"{longest - 1} before it answers.",
                line=row.line,
                field="cutoff_len",
                hint=f"cutoff_len: {longest - 1} cuts such prompts",
            )
    return questions


def settings_of(asked: PredictingFields, stop_ids: Sequence[int], seed: int) -> Settings:
    """How rows are answered: as the job says, whatever the model's own files say."""
    return Settings(
        temperature=asked.spoken_at,
        top_p=asked.top_p,
        top_k=asked.top_k,
        repetition_penalty=asked.repetition_penalty,
        max_new_tokens=asked.max_new_tokens,
        stop=(),
        stop_ids=tuple(stop_ids),
        seed=seed,
    )


def predict(
    questions: Sequence[Exchange],
    speaker: Speaker,
    *,
    batch_size: int,
    progress: Callable[[int, int, str], None],
) -> Predictions:
    """Answer all questions, the longest first, and score the answers.

    progress: told (done, total, unit) after each batch, and after each row that is scored.
    """
    said: dict[int, str] = {}
    progress(0, len(questions), "rows answered")
    for number, batch in enumerate(grouped([q.prompt for q in questions], batch_size)):
        answers = speaker.answer([questions[i].prompt for i in batch], batch=number)
        said |= {i: answer.text for i, answer in zip(batch, answers, strict=True)}
        progress(len(said), len(questions), "rows answered")
    lines = [_line(question, said[i], speaker.chat) for i, question in enumerate(questions)]
    rows = []
    for line in lines:
        speaker.give_way()
        rows.append(scores(line["predict"], line["label"]))
        progress(len(rows), len(lines), "rows scored")
    return Predictions(lines, mean_scores(rows))


def _line(question: Exchange, said: str, chat: Chat) -> dict[str, str]:
    decode = chat.tokenizer.decode
    return {
        "prompt": str(decode(question.prompt, skip_special_tokens=False)),
        "predict": said,
        "label": str(decode(question.label, skip_special_tokens=True)),
    }


def tell_progress(attempt: Attempt) -> Callable[[int, int, str], None]:
    """Progress as events."""

    def progress(done: int, total: int, unit: str) -> None:
        attempt.events.emit("progress", done=done, total=total, unit=unit, eta_s=None)

    return progress
