"""Room tunnel; see docs/architecture.md."""
