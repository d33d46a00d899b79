"""Firezone data plane: the public names, nothing else."""
