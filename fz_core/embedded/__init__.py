"""Room embedded; see docs/architecture.md."""
