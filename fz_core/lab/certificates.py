"""A certificate authority for one lab, made by `openssl`. Programs trust it through `SSL_CERT_FILE`."""

from __future__ import annotations

import ipaddress
from pathlib import Path

from fz_core.lab.processes import run

DAYS = "2"
CONFIG = """
[req]
distinguished_name = name
prompt = no
[name]
CN = {subject}
[ca]
basicConstraints = critical, CA:TRUE
keyUsage = critical, keyCertSign
subjectKeyIdentifier = hash
"""
LEAF = """
[leaf]
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = serverAuth
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
subjectAltName = {names}
"""


class Authority:
    """`certificate` is what to trust."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.certificate, self._key = folder / "ca.pem", folder / "ca.key"
        self._make("ca", CONFIG.format(subject="lab"), "ca", self.certificate, self._key)

    @property
    def trust(self) -> dict[str, str]:
        """The environment of a program that trusts this authority, and no other."""
        return {"SSL_CERT_FILE": str(self.certificate)}

    def issue(self, *names: str) -> tuple[Path, Path]:
        """A certificate for names or IP addresses, and its key."""
        certificate, key = self._folder / f"{names[0]}.pem", self._folder / f"{names[0]}.key"
        config = CONFIG.format(subject=names[0]) + LEAF.format(names=", ".join(map(_alternative, names)))
        issuer = ("-CA", str(self.certificate), "-CAkey", str(self._key))
        self._make(names[0], config, "leaf", certificate, key, *issuer)
        return certificate, key

    def _make(self, name: str, config: str, section: str, certificate: Path, key: Path, *issuer: str) -> None:
        path = self._folder / f"{name}.cnf"
        path.write_text(config)
        curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
        made = ("-days", DAYS, "-keyout", str(key), "-out", str(certificate))
        run(["openssl", "req", "-x509", *curve, "-config", str(path), "-extensions", section, *issuer, *made])


def _alternative(name: str) -> str:
    try:
        return f"IP:{ipaddress.ip_address(name)}"
    except ValueError:
        return f"DNS:{name}"
