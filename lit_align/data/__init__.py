"""Prompts, image-text pairs, and the loader that turns rollouts into minibatches."""
