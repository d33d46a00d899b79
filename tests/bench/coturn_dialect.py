"""One of our programs with coturn in the place of a relay: `python -m tests.bench.coturn_dialect MODULE [ARGUMENT]...`.

coturn's passwords are made otherwise than a portal's, and it challenges requests that are not signed
(spec/relay.md §12). So that whole systems can use it, the portal hands out passwords coturn knows, the relay, which
announces itself and carries nothing, has the secret coturn has, and clients and gateways begin without a signature.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import runpy
import sys
from functools import partial

from fz_core.embedded import portal_derivation, relay
from fz_core.embedded.relay import RelayConfig
from fz_core.node import relaying
from fz_core.turn import Allocation

SECRET = "c0" * 32
REALM = "firezone"


def credentials(expires_at: int, salt: str, stamp_secret: str) -> tuple[str, str]:
    """As coturn's `use-auth-secret` wants them."""
    username = f"{expires_at}:{salt}"
    mac = hmac.digest(stamp_secret.encode(), username.encode(), hashlib.sha1)
    return username, base64.b64encode(mac).decode()


def coturn(ip: str, port: int = 3478) -> list[str]:
    """The command line that serves at this address."""
    return [
        *("turnserver", "-n", "--no-cli", "--no-tls", "--no-dtls", "--no-tcp", "--fingerprint", "--simple-log"),
        *("--use-auth-secret", f"--static-auth-secret={SECRET}", f"--realm={REALM}"),
        *(f"--listening-ip={ip}", f"--relay-ip={ip}", f"--listening-port={port}"),
        *("--allocation-default-address-family=keep", "--userdb=:memory:", "--pidfile=/dev/null", "--log-file=stdout"),
    ]


def main() -> None:
    """Change what is different, then be that program."""
    vars(portal_derivation)["relay_credentials"] = credentials
    vars(relay)["RelayConfig"] = partial(RelayConfig, stamp_secret=SECRET)
    vars(relaying)["Allocation"] = partial(Allocation, accept_unsigned_challenge=True)
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
