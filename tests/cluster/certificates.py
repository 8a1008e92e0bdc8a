"""A certificate authority for one test run, by the openssl command."""

from __future__ import annotations

import itertools
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

# The system's openssl.cnf would make every certificate an authority.
_CONFIG = "[req]\ndistinguished_name = dn\n[dn]\n"


class Authority:
    """Issues certificates signed by `certificate`, PEM files under `directory`.

    training-operator replaces its webhook's certificates unless the authority's key is PKCS#1 RSA,
    the authority is named like its own one and everything is valid for over 90 days
    (cert-controller v0.12 `rotator.go`): so they are.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True)
        self.directory = directory
        self.certificate = directory / "ca.crt"
        self.key = directory / "ca.key"
        self._config = directory / "openssl.cnf"
        self._config.write_text(_CONFIG)
        self._numbers = itertools.count()
        _openssl("genrsa", "-traditional", "-out", str(self.key), "2048")
        extensions = ["basicConstraints=critical,CA:TRUE", "keyUsage=critical,keyCertSign,cRLSign"]
        names = ["subjectKeyIdentifier=hash", "subjectAltName=DNS:training-operator-ca"]
        self._request(self.certificate, self.key, "/CN=modelchain-tests", extensions + names, [])

    def server(self, name: str, *alternative_names: str) -> tuple[Path, Path]:
        """Certificate and key of a server with these names ("DNS:..." or "IP:...")."""
        return self._issue(
            name,
            f"/CN={name}",
            ["extendedKeyUsage=serverAuth", f"subjectAltName={','.join(alternative_names)}"],
        )

    def client(self, user: str, groups: Sequence[str] = ()) -> tuple[Path, Path]:
        """Certificate and key by which the API server knows this user of these groups."""
        subject = "".join(f"/O={group}" for group in groups) + f"/CN={user}"
        name = re.sub(r"[^a-zA-Z0-9.-]", "-", user)
        return self._issue(
            f"{name}-{next(self._numbers)}", subject, ["extendedKeyUsage=clientAuth"]
        )

    def service_account_key(self) -> Path:
        """The key that signs service account tokens."""
        key = self.directory / "service-account.key"
        _openssl("genrsa", "-out", str(key), "2048")
        return key

    def _issue(self, name: str, subject: str, extensions: list[str]) -> tuple[Path, Path]:
        certificate, key = self.directory / f"{name}.crt", self.directory / f"{name}.key"
        _openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", str(key))
        leaf = [
            "basicConstraints=critical,CA:FALSE",
            "keyUsage=critical,digitalSignature",
            "authorityKeyIdentifier=keyid",
        ]
        self._request(
            certificate,
            key,
            subject,
            leaf + extensions,
            ["-CA", str(self.certificate), "-CAkey", str(self.key)],
        )
        return certificate, key

    def _request(
        self, certificate: Path, key: Path, subject: str, extensions: list[str], signer: list[str]
    ) -> None:
        added = [word for extension in extensions for word in ("-addext", extension)]
        to = ["-key", str(key), "-out", str(certificate), "-subj", subject, "-days", "3650"]
        _openssl("req", "-x509", "-config", str(self._config), *to, *added, *signer)


def _openssl(*args: str) -> None:
    command = subprocess.run(["openssl", *args], text=True, capture_output=True)
    if command.returncode:
        raise RuntimeError(f"openssl {args[0]}: {command.stderr}")
