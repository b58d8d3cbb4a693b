"""What benchmarks/train_step.py is made of: shapes, contenders, matrix products, the process that each contender has to itself."""
