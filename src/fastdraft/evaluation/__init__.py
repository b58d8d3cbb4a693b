"""What a draft is worth on tasks: prompts, texts, replay, exact runs, and the rows of `results.json`."""
