"""Which objective a stage has, and what it compares with."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tuneyard.runners.arguments import FinetuneArguments
from tuneyard.runners.base_model import load_weights, read_config
from tuneyard.runners.losses import Objective, RunningMean, TokenLoss
from tuneyard.runners.preferences import LabelLoss, PairLoss, Reference, RewardLoss
from tuneyard.specs.preferences import WITHOUT_REFERENCE


def objective_of(
    arguments: FinetuneArguments, reference: Callable[[], Reference], baseline: RunningMean
) -> Objective:
    """The objective of a stage. reference: makes what answers are compared with, where needed."""
    if arguments.stage in ("sft", "pt"):
        return TokenLoss(arguments.label_smoothing_factor)
    if arguments.stage == "rm":
        return RewardLoss()
    if arguments.stage == "kto":
        return LabelLoss(
            beta=arguments.pref_beta,
            reference=reference(),
            wanted_weight=arguments.kto_chosen_weight,
            unwanted_weight=arguments.kto_rejected_weight,
            ftx=arguments.pref_ftx,
        )
    return PairLoss(
        form=arguments.pref_loss,
        beta=arguments.pref_beta,
        reference=None if arguments.pref_loss in WITHOUT_REFERENCE else reference(),
        ftx=arguments.pref_ftx,
        label_smoothing=arguments.dpo_label_smoothing,
        simpo_gamma=arguments.simpo_gamma,
        ld_alpha=arguments.ld_alpha,
        bco=arguments.pref_bco_weight,
        baseline=baseline,
    )


def load_reference(
    model: Any, folder: Path | None, base: Path, *, dtype: Any, device: str
) -> Reference:
    """What answers are compared with: the folder's model, or the trained one as it began.

    An adapter that is switched off leaves the base; a model that learns as a whole needs a second
    copy of its base.
    """
    if folder is None and hasattr(model, "disable_adapter"):
        return Reference()
    folder = folder or base
    frozen = load_weights(folder, read_config(folder), dtype=dtype, device=device)
    return Reference(frozen.requires_grad_(False).eval())
