"""Room driver; see docs/architecture.md."""
