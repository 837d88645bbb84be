"""What a job may say and probably does not mean, or what is not done as it says."""

from collections.abc import Iterator

from pydantic import BaseModel, ConfigDict

from tuneyard.specs.fields import Spec
from tuneyard.specs.finetune import TEMPLATES, FinetuneSpec
from tuneyard.specs.llamafactory import TEMPLATE_NAMES
from tuneyard.specs.merge import MergeSpec
from tuneyard.specs.predicting import idle_settings
from tuneyard.specs.preferences import idle_preferences
from tuneyard.specs.rewards import ONLINE
from tuneyard.specs.tuning import OF_A_NEW_ADAPTER, idle_fields


class Note(BaseModel):
    """Something in a document that was understood otherwise than it was written."""

    model_config = ConfigDict(frozen=True)
    field: str
    message: str


def notes_on(spec: Spec) -> list[Note]:
    """All there is to say of a spec that is right."""
    found = [*_template(spec)]
    if isinstance(spec, MergeSpec):
        found += _export(spec)
    if isinstance(spec, FinetuneSpec):
        found += [*_what_learns(spec), *_steps(spec), *_held_out(spec)]
    return found


def _note(field: str, message: str) -> Note:
    return Note(field=field, message=message)


def _template(spec: Spec) -> Iterator[Note]:
    template = getattr(spec, "template", None)
    if template in TEMPLATE_NAMES and template not in TEMPLATES:
        yield _note("template", f"template = {template}: the base's own template is used")


def _export(spec: MergeSpec) -> Iterator[Note]:
    if spec.export_legacy_format:
        message = "export_legacy_format has no effect: safetensors are written"
        yield _note("export_legacy_format", message)
    if spec.export_dir:
        message = "export_dir is a folder of yours: `--wait` writes the model there, "
        yield _note("export_dir", message + "`tuneyard fetch JOB --out DIR` does it later")


def _what_learns(spec: FinetuneSpec) -> Iterator[Note]:
    """Of the adapter, of what it goes on from and is compared with, of the result."""
    for name in idle_fields(spec):
        yield _note(name, f"{name} has no effect with finetuning_type {spec.finetuning_type}")
    for name in idle_preferences(spec, spec.stage):
        yield _note(name, f"{name} has no effect in stage {spec.stage}")
    if spec.goes_on:
        for name in sorted(OF_A_NEW_ADAPTER & spec.model_fields_set):
            yield _note(name, f"{name} has no effect: the adapter goes on as it was made")
    named = spec.ref_model or spec.ref_model_adapters
    if spec.goes_on and spec.compares and not named and spec.reference == "base":
        base = "base with the adapters before the last" if len(spec.adapters) > 1 else "bare base"
        message = f"answers are compared with the {base}, not with the adapter as it was: "
        yield _note("adapter", message + "create_new_adapter: true compares with that")
    if spec.pissa_init and not spec.pissa_convert:
        message = "pissa_init: the result is a LoRA of twice the rank over the untouched base"
        yield _note("pissa_init", message)
    if spec.output_dir:
        message = "output_dir is a name that a merge may say; `tuneyard fetch` writes folders"
        yield _note("output_dir", message)


def _steps(spec: FinetuneSpec) -> Iterator[Note]:
    if 0 < spec.max_steps <= spec.warmup_steps:
        message = f"warmup_steps = {spec.warmup_steps:g} is not over in {spec.max_steps} steps:"
        message += f" learning_rate = {spec.learning_rate:g} is never reached"
        yield _note("warmup_steps", message)
    if "save_steps" in spec.model_fields_set and 0 < spec.max_steps < spec.save_steps:
        message = f"save_steps = {spec.save_steps:g} is never reached in {spec.max_steps} steps"
        yield _note("save_steps", message)
    if spec.stage == "kto" and spec.per_device_train_batch_size < 2:
        message = "the KL divergence is estimated over the rows of a batch: set 2 or more"
        yield _note("per_device_train_batch_size", message)


def _held_out(spec: FinetuneSpec) -> Iterator[Note]:
    """Of held-out rows, and of what is measured on them and said of them."""
    if 0.5 < spec.val_size < 1:
        message = f"val_size = {spec.val_size:g} holds out more rows than are learned"
        yield _note("val_size", message)
    if spec.eval_steps is not None and spec.eval_strategy != "steps":
        yield _note(
            "eval_steps", f"eval_steps has no effect: eval_strategy is {spec.eval_strategy}"
        )
    if spec.predict_with_generate and spec.eval_strategy != "no":
        message = "answers are made and BLEU and ROUGE measured at last; eval_loss is in between"
        yield _note("predict_with_generate", message)
    draws = {"temperature"} if spec.stage in ONLINE else set()
    for name in idle_settings(spec):
        if name not in draws:
            message = f"{name} has no effect: a fine-tune answers rows where do_predict asks for it"
            yield _note(name, message)
    used = spec.measures or spec.generates
    if spec.compute_accuracy and not (used and spec.stage in ("pt", "sft")):
        why = f"stage {spec.stage} has measures of its own" if used else "nothing is evaluated"
        message = f"compute_accuracy has no effect: {why}"
        yield _note("compute_accuracy", message)
    if (spec.val_size or spec.eval_dataset) and not used:
        message = "rows are held out, and eval_strategy: no never looks at them"
        yield _note("eval_strategy", message)
