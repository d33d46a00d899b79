"""Room stun; see docs/architecture.md."""
