"""Room lab; see docs/architecture.md."""
