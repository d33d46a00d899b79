"""firezone-headless-client: arguments and wiring, nothing else."""

import gc

gc.disable()  # until everything is imported: nothing of it is garbage, and looking takes a tenth of a start
try:
    import fz_core.crypto  # noqa: F401  # compiled for this Python, and libsodium is there
except ImportError as error:
    raise SystemExit(f"firezone-headless-client: {error}") from None
