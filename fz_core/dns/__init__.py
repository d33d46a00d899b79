"""Room dns; see docs/architecture.md."""
