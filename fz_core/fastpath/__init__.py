"""Room fastpath; see docs/architecture.md."""
