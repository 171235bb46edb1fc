"""What ltloss costs, beside the tools people use today: ``python -m benchmarks.loss_cpu``."""
