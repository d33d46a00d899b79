"""firezone-gateway: arguments and wiring, nothing else."""
