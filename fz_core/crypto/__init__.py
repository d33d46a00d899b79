"""Room crypto; see docs/architecture.md."""
