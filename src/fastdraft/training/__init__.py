"""The training loop that pretrain, continue_pretrain and align share, and its parts."""
