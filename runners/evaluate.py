"""Measure a model on rows with answers:  python -P -m tuneyard.runners.evaluate SPEC.json WORKDIR

inputs: model (a folder), adapter (a folder, optional), eval_dataset (a file), or dataset of which
val_size holds rows out. arguments: those of EvaluateArguments. output: eval_results.json,
predict_results.json with generated_predictions.jsonl, and all_results.json with both.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from tuneyard.runners.arguments import EvaluateArguments, InferArguments, arguments_of
from tuneyard.runners.attempt import Attempt, main
from tuneyard.runners.data_files import data_file
from tuneyard.runners.devices import make_ready
from tuneyard.runners.failures import BadSpec
from tuneyard.runners.infer import ask_of, load_chat, load_speaker, stop_ids
from tuneyard.runners.results import measures_files, write_texts
from tuneyard.runners.rows import Conversation, read_conversations
from tuneyard.runners.similarity import check_packages
from tuneyard.specs.evaluate import evaluate_clashes
from tuneyard.specs.fields import DATA_FILES
from tuneyard.specs.numbers import asked_format
from tuneyard.store.folder import publish_folder

if TYPE_CHECKING:
    from tuneyard.runners.generation import Speaker


def evaluate(attempt: Attempt) -> None:
    """Check, load, measure, publish."""
    arguments = read_arguments(attempt)
    rows = read_rows(attempt, arguments)
    asked = ask_of(attempt, _as_inference(arguments), ())
    attempt.events.emit("phase", phase="loading")
    make_ready(attempt.device)
    from tuneyard.runners.predictions import (
        held_out_of,
        predict,
        questions_of,
        settings_of,
        tell_progress,
    )

    chat = load_chat(asked)
    if arguments.default_system is not None:
        chat = replace(chat, default_system=arguments.default_system)
    if "eval_dataset" not in attempt.spec.inputs:
        size = arguments.val_size
        rows = held_out_of(rows, arguments, chat, val_size=size, seed=asked.seed)
    settings = settings_of(arguments, stop_ids(asked, chat), asked.seed)
    speaker = load_speaker(asked, attempt, chat, settings)
    questions = []
    if arguments.generates:
        cutoff = arguments.cutoff_len
        questions = questions_of(rows, chat, cutoff_len=cutoff, longest=speaker.limit)
    attempt.begin()
    measured: dict[str, dict[str, float]] = {"eval": {}, "predict": {}}
    said: dict[str, str] = {}
    if arguments.do_eval:
        measured["eval"] |= losses_on(rows, arguments, speaker, attempt)
    if questions:
        size, progress = arguments.per_device_eval_batch_size, tell_progress(attempt)
        found = predict(questions, speaker, batch_size=size, progress=progress)
        prefix = "predict" if arguments.do_predict else "eval"
        measured[prefix] |= found.values(prefix)
        said = found.files
    publish(attempt, arguments, measured, said, settings)


def read_arguments(attempt: Attempt) -> EvaluateArguments:
    """Arguments that leave something to measure. Raises: BadSpec."""
    arguments = arguments_of(attempt, EvaluateArguments)
    inputs = attempt.spec.inputs
    separate = "eval_dataset" in inputs
    held_out = separate or ("dataset" in inputs and arguments.val_size > 0)
    for clash in evaluate_clashes(arguments, held_out=held_out, separate=separate):
        raise BadSpec(clash.message, field=clash.field, hint=clash.hint)
    if arguments.generates:
        check_packages()
    return arguments


def read_rows(attempt: Attempt, arguments: EvaluateArguments) -> Sequence[Conversation]:
    """All rows of the data set that is to be measured, or divided."""
    name = "eval_dataset" if "eval_dataset" in attempt.spec.inputs else "dataset"
    picked = {"eval_dataset": arguments.eval_data_file, "dataset": arguments.data_file}[name]
    file = data_file(attempt.input(name), picked, field=DATA_FILES[name])
    return read_conversations(file, limit=arguments.max_samples)


def _as_inference(arguments: EvaluateArguments) -> InferArguments:
    """What loading a model to speak needs to know."""
    return InferArguments(
        template=arguments.template,
        seed=arguments.seed,
        precision=asked_format(arguments),
        prompts=[],
    )


def losses_on(
    rows: Sequence[Conversation], arguments: EvaluateArguments, speaker: "Speaker", attempt: Attempt
) -> dict[str, float]:
    """The loss over all targets of the rows, and the accuracy if it is wanted."""
    from tuneyard.runners.losses import TokenLoss
    from tuneyard.runners.measuring import measure
    from tuneyard.runners.packing import packed
    from tuneyard.runners.predictions import tell_progress
    from tuneyard.runners.tokenising import encode_split

    items = packed(encode_split(rows, arguments, speaker.chat, attempt).examples, arguments)
    tell = tell_progress(attempt)

    def before_each(done: int) -> None:
        speaker.give_way()
        tell(done, len(items), "rows")

    loss, measures = measure(
        speaker.model,
        items,
        TokenLoss(accuracy=arguments.compute_accuracy),
        rows=arguments.per_device_eval_batch_size,
        pad_id=speaker.chat.tokenizer.pad_token_id,
        device=attempt.device.torch_name,
        before_each=before_each,
    )
    tell(len(items), len(items), "rows")
    return {"eval_loss": loss} | {f"eval_{name}": value for name, value in measures.items()}


def publish(
    attempt: Attempt,
    arguments: EvaluateArguments,
    measured: dict[str, dict[str, float]],
    said: dict[str, str],
    settings: Any,
) -> None:
    """Write output/, and say what was measured."""
    attempt.stops.defer()  # until here a stop loses nothing that could be kept
    values = measured["eval"] | measured["predict"]
    attempt.events.metric(0, **values)
    aside = attempt.fresh_aside()
    write_texts(aside, said | measures_files(measured))
    meta: dict[str, Any] = {"kind": "results", "inputs": dict(attempt.spec.input_ids)}
    if arguments.generates:
        meta["settings"] = asdict(settings)
    publish_folder(aside, attempt.output, meta)
    attempt.events.emit("result", values=values)


if __name__ == "__main__":
    main(evaluate)
