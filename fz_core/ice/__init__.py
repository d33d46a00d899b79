"""Room ice; see docs/architecture.md."""
