"""Training and judging language models on text that every machine has."""
