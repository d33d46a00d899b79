"""Room portal; see docs/architecture.md."""
