"""firezone-headless-client: arguments and wiring, nothing else."""
