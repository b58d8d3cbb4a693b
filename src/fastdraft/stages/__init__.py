"""One file per stage: its settings beside its run(). Stages never import each other."""
