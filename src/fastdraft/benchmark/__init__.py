"""How long answers take with and without a draft, and the rows of `benchmark.json`."""
