"""Autoregressive and speculative decoding with caches, replay, and what evaluation counts with them."""
