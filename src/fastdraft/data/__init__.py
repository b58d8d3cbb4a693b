"""Corpora, packed shards, chat templates, prompts and synthetic rows."""
