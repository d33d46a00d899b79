"""firezone-headless-client: arguments and wiring, nothing else."""

import gc
import signal

if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
    # A change of network that comes while we start is none to us, and no reason to die.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
gc.disable()  # until everything is imported: nothing of it is garbage, and looking takes a tenth of a start
try:
    import fz_core.crypto  # noqa: F401  # compiled for this Python, and libsodium is there
except ImportError as error:
    raise SystemExit(f"firezone-headless-client: {error}") from None
