"""Which objective a stage has."""

from tuneyard.runners.arguments import FinetuneArguments
from tuneyard.runners.losses import Objective, RunningMean, TokenLoss
from tuneyard.runners.online import GrpoLoss, RlooLoss
from tuneyard.runners.preferences import LabelLoss, PairLoss, RewardLoss
from tuneyard.runners.reference import Reference


def objective_of(
    arguments: FinetuneArguments, reference: Reference | None, baseline: RunningMean
) -> Objective:
    """The objective of a stage. reference: what answers are compared with, where they are."""
    if arguments.stage in ("sft", "pt"):
        return TokenLoss(
            accuracy=arguments.compute_accuracy, smoothing=arguments.label_smoothing_factor
        )
    if arguments.stage == "rm":
        return RewardLoss()
    if arguments.stage == "rloo":
        return RlooLoss(arguments.drawn_at)
    if arguments.stage == "grpo":
        return GrpoLoss(
            form=arguments.loss_type,
            beta=arguments.distance_weight,
            temperature=arguments.drawn_at,
            longest=arguments.max_completion_length,
            reference=reference,
        )
    if arguments.stage == "kto" and reference is not None:
        return LabelLoss(
            beta=arguments.pref_beta,
            reference=reference,
            wanted_weight=arguments.kto_chosen_weight,
            unwanted_weight=arguments.kto_rejected_weight,
            ftx=arguments.pref_ftx,
        )
    return PairLoss(
        form=arguments.pref_loss,
        beta=arguments.pref_beta,
        reference=reference,
        ftx=arguments.pref_ftx,
        label_smoothing=arguments.dpo_label_smoothing,
        simpo_gamma=arguments.simpo_gamma,
        ld_alpha=arguments.ld_alpha,
        bco=arguments.pref_bco_weight,
        baseline=baseline,
    )
