"""The parts of train_step.py: contenders, a process for each, an accelerator held against the CPU."""
