"""firezone-headless-client: arguments and wiring, nothing else."""

try:
    import fz_core.crypto  # noqa: F401  # compiled for this Python, and libsodium is there
except ImportError as error:
    raise SystemExit(f"firezone-headless-client: {error}") from None
