"""Room turn; see docs/architecture.md."""
