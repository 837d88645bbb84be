"""How a fine-tune learns from judged answers: stages rm, dpo and kto, by LLaMA-Factory's names."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from tuneyard.specs.errors import InputError
from tuneyard.specs.fields import AdapterRef, ModelRef, Spec
from tuneyard.specs.problems import problem

WITHOUT_REFERENCE = frozenset({"orpo", "simpo"})
"""Losses of stage dpo that compare with no other model."""

COMPARING = ("dpo", "kto", "grpo", "rloo")
"""Stages that may compare with another model."""

Weight = Annotated[float, Field(ge=0, le=1000)]


class PreferenceFields(Spec):
    """What a fine-tune says of judged answers."""

    pref_loss: Literal["sigmoid", "hinge", "ipo", "orpo", "simpo"] = Field(
        "sigmoid", description="Loss of stage dpo."
    )
    pref_beta: float = Field(
        0.1, gt=0, le=100, description="Stages dpo and kto: how far to go from the reference."
    )
    pref_ftx: Weight = Field(
        0.0, description="Stages dpo and kto: weight of the wanted answers' own loss."
    )
    pref_bco_weight: Weight = Field(0.0, description="Stage dpo: weight of the bco loss beside it.")
    dpo_label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="pref_loss sigmoid: share of pairs the wrong way round."
    )
    ld_alpha: float | None = Field(
        None, ge=0, le=1, description="Stage dpo: weight of what the longer answer has more."
    )
    simpo_gamma: float = Field(0.5, ge=0, le=100, description="pref_loss simpo: the margin.")
    kto_chosen_weight: Weight = Field(1.0, description="Stage kto: weight of wanted answers.")
    kto_rejected_weight: Weight = Field(1.0, description="Stage kto: weight of the others.")
    ref_model: ModelRef | None = Field(
        None, description="The model to compare with; unset: see reference."
    )
    ref_model_adapters: AdapterRef | None = Field(
        None, description="An adapter over ref_model, or over the base, to compare with."
    )
    ref_model_quantization_bit: Literal[4, 8] | None = Field(
        None, description="The named model to compare with in so many bits."
    )
    reference: Literal["start", "base"] = Field(
        "start",
        description="Where no model to compare with is named and an adapter goes on: the adapter "
        "as it began, or the bare base, which is what adapter_name_or_path means.",
    )


_JUDGED = ("dpo", "kto")
_LOOKED_AT: dict[str, tuple[str, ...]] = {
    "pref_loss": ("dpo",),
    "pref_beta": _JUDGED,
    "pref_ftx": _JUDGED,
    "pref_bco_weight": ("dpo",),
    "dpo_label_smoothing": ("dpo",),
    "ld_alpha": ("dpo",),
    "simpo_gamma": ("dpo",),
    "kto_chosen_weight": ("kto",),
    "kto_rejected_weight": ("kto",),
}
"""Field -> the stages that look at it."""


def idle_preferences(spec: PreferenceFields, stage: str) -> list[str]:
    """Fields that this stage does not look at, and that say something else than they do unset."""
    idle = [name for name, stages in _LOOKED_AT.items() if stage not in stages]
    return [name for name in idle if spec.differs(name)]


def preference_clashes(spec: PreferenceFields, stage: str) -> Iterator[InputError]:
    """What a stage or a loss does not look at, or cannot do."""
    told = spec.model_fields_set
    if "dpo_label_smoothing" in told and spec.dpo_label_smoothing and spec.pref_loss != "sigmoid":
        message = f"dpo_label_smoothing has no meaning for pref_loss {spec.pref_loss}."
        yield problem("conflicting_fields", message, "dpo_label_smoothing", "pref_loss: sigmoid")
    if stage == "kto" and not (spec.kto_chosen_weight or spec.kto_rejected_weight or spec.pref_ftx):
        message = "kto_chosen_weight and kto_rejected_weight are both 0: nothing would be learned."
        yield problem("nothing_to_do", message, "kto_chosen_weight", "leave one of them out")
    alone = stage == "dpo" and spec.pref_loss in WITHOUT_REFERENCE
    if spec.pref_bco_weight and alone:
        message = f"pref_bco_weight compares with a reference, and {spec.pref_loss} has none."
        yield problem("conflicting_fields", message, "pref_bco_weight", "pref_loss: sigmoid")
    for name in ("ref_model", "ref_model_adapters"):
        if getattr(spec, name) is not None and (alone or stage not in COMPARING):
            what = f"pref_loss {spec.pref_loss}" if alone else f"stage {stage}"
            message = f"{what} compares with no reference."
            yield problem("conflicting_fields", message, name, "leave it out")
    if spec.ref_model_quantization_bit and not (spec.ref_model or spec.ref_model_adapters):
        message = "ref_model_quantization_bit is of a model to compare with, and none is named."
        yield problem("missing_field", message, "ref_model", "name one, or leave the bits out")
    if spec.ld_alpha is not None and spec.pref_loss in ("ipo", *WITHOUT_REFERENCE):
        message = f"pref_loss {spec.pref_loss} takes the mean of an answer already."
        yield problem("conflicting_fields", message, "ld_alpha", "pref_loss: sigmoid or hinge")
