"""Room wireguard; see docs/architecture.md."""
