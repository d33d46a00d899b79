"""Room linux; see docs/architecture.md."""
