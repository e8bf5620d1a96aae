"""Overrides that make RLP and ConMax a run of seconds."""

THINKING = [
    "+experiment=rlp",
    "model.hidden_size=32",
    "model.layers=2",
    "model.heads=2",
    "model.intermediate_size=64",
    "cold_start.steps=0",
    "sampling.max_new_tokens=8",
    "batch.prompts_per_step=4",
    "batch.group_size=4",
    "batch.token_budget=256",
    "optimizer.learning_rate=1e-3",
    "scorer.decay=0.9",
    "evaluation.every_steps=2",
    "evaluation.problems=6",
    "checkpoint.every_steps=2",
    "tracking.wandb=disabled",
    "steps=4",
]

COMPRESSION = [
    "+experiment=conmax",
    "model.hidden_size=32",
    "model.layers=2",
    "model.heads=2",
    "model.intermediate_size=64",
    "sampling.max_new_tokens=12",
    "batch.prompts_per_step=4",
    "batch.group_size=4",
    "batch.token_budget=512",
    "optimizer.learning_rate=1e-3",
    "evaluation.every_steps=2",
    "evaluation.problems=6",
    "checkpoint.every_steps=2",
    "tracking.wandb=disabled",
    "steps=4",
]
