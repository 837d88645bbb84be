"""Fine-tune a base, in any stage:  python -P -m tuneyard.runners.finetune SPEC.json WORKDIR

inputs: model (a folder), dataset (a file); optional: eval_dataset (a file), tokens (a folder that a
prepare job made of them), adapter, adapter_2, … (folders to go on from), ref_model,
ref_model_adapters, reward_model and reward_base (folders). arguments: those of FinetuneArguments.
output: the adapter in peft's format with the tokenizer, or a whole model; tuneyard.json; what it
said of watch-prompts and held-out rows.
"""

from tuneyard.runners.asked import read_asked
from tuneyard.runners.attempt import Attempt, main
from tuneyard.runners.devices import make_ready
from tuneyard.runners.peft_import import import_peft
from tuneyard.runners.tokenising import load_chat, read_rows_of, read_tokens, tokenise


def finetune(attempt: Attempt) -> None:
    """Check, load, train, say, publish."""
    asked = read_asked(attempt)
    prepared = "tokens" in attempt.spec.inputs
    rows = {} if prepared else read_rows_of(attempt, asked.arguments)
    attempt.events.emit("phase", phase="loading")
    make_ready(attempt.device, deterministic=asked.arguments.full_determinism)
    # Not before the data are known to be good: torch and transformers take seconds to import.
    import_peft(attempt)
    from tuneyard.runners.adapter_folder import publish_tuned
    from tuneyard.runners.assembly import build_trainer
    from tuneyard.runners.saying import Saying
    from tuneyard.runners.tracking import tracked

    chat = load_chat(asked.model, asked.arguments, attempt)
    if prepared:
        folder = attempt.input("tokens")
        tokenised = read_tokens(folder, asked.arguments, asked.model, chat, attempt)
    else:
        tokenised = tokenise(rows, asked.arguments, chat, attempt)
    trainer = build_trainer(asked, attempt, chat, tokenised)
    saying = Saying(asked, attempt, chat, trainer, rows=len(tokenised.examples))
    attempt.begin()
    with tracked(asked, attempt, trainer):
        trainer.train()
        predictions = saying.predict()
    beside = saying.files(predictions)
    measured = predictions.values(saying.prefix) if predictions else {}
    publish_tuned(asked, attempt, chat, trainer, beside=beside, measured=measured)


if __name__ == "__main__":
    main(finetune)
