"""Questions for stages grpo and rloo, and what a run of them needs."""

from typing import Any

QUESTIONS = [
    {"prompt": f"What does a {animal} say?", "answer": "a"}
    for animal in ("cat", "dog", "heron", "ox", "gnu", "tapir", "eel", "wolf")
]
LETTER = {"name": "regex", "pattern": "[a-m]"}
"""What an untrained byte model does now and then, and learns to do within seconds."""

SHORT: dict[str, Any] = {
    "stage": "grpo",
    "reward_funcs": [LETTER],
    "max_completion_length": 6,
    "num_generations": 8,
    "per_device_train_batch_size": 32,
    "max_steps": 4,
    "learning_rate": 0.03,
    "lr_scheduler_type": "constant",
}
