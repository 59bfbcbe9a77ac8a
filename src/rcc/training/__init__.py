"""Train a model: a recipe becomes a run of stages, each with its batches, objective and checkpoints."""
