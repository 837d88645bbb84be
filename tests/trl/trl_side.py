"""The same steps by TRL:  python trl_side.py TASK.json RESULT.safetensors

Runs in an environment that has TRL. Answers are not drawn but read from a tape, with their rewards;
everything else is TRL's: advantages, losses, reference, clipping, AdamW. TASK.json: base, adapter
(folders), stage, options (of TRL's configuration), rows (prompt, ids), steps (answers, rewards).
"""

import json
import sys
from pathlib import Path

import torch
import trl
from datasets import Dataset
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

CLASSES = {
    "grpo": (trl.GRPOTrainer, trl.GRPOConfig),
    "rloo": (trl.RLOOTrainer, trl.RLOOConfig),
}


def main(task, result):
    trainer_class, config_class = CLASSES[task["stage"]]
    steps = iter(task["steps"])
    now = {}

    class FromTape(trainer_class):
        def _generate_single_turn(self, prompt_ids, *_, **__):
            now.update(next(steps))
            assert [list(ids) for ids in prompt_ids] == now["asked"]
            return (now["answers"], None) if task["stage"] == "grpo" else now["answers"]

    model = LlamaForCausalLM.from_pretrained(task["base"], dtype=torch.float32)
    model = PeftModel.from_pretrained(model, task["adapter"], is_trainable=True)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(task["base"])
    trainer = FromTape(
        model=model,
        args=config_class(output_dir=str(result.parent / "trl"), **task["options"]),
        reward_funcs=lambda completions, **_: now["rewards"],
        train_dataset=Dataset.from_list([{"prompt": text} for text in task["prompts"]]),
        processing_class=tokenizer,
    )
    trainer.train()
    learned = get_peft_model_state_dict(trainer.model, save_embedding_layers=False)
    history = [line for line in trainer.state.log_history if "loss" in line]
    save_file(
        {name: tensor.contiguous() for name, tensor in learned.items()},
        result,
        metadata={"history": json.dumps(history)},
    )


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
