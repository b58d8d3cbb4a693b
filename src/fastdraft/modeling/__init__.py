"""Models: shapes and their costs, first weights, loading and saving, what a target's vocabulary hides."""
