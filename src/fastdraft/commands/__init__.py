"""Verbs that are not stages: inspect, check, preview, generate, recipes."""
