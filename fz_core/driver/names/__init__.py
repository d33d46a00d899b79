"""Names: lookups past the tunnel and through it, the gateway's resolver and its DNS server (`docs/names.md`)."""
