"""Growing a trained model without changing its outputs; benchmarks/grow.py is its command."""
