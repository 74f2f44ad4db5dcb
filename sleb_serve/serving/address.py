"""Where a server is, and the key that it is asked with."""

from __future__ import annotations

import os
import re
import urllib.parse
from dataclasses import dataclass

from sleb_serve.errors import SlebError
from sleb_serve.utils import strict_json


@dataclass(frozen=True)
class Address:
    """Where a server is: ``path`` is what stands before ``/v1``, without a slash at its end."""

    secure: bool
    host: str
    port: int
    path: str

    @property
    def url(self) -> str:
        """The address as a URL."""
        scheme, usual = ("https", 443) if self.secure else ("http", 80)
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{scheme}://{host}{'' if self.port == usual else f':{self.port}'}{self.path}"


def key_of_environment() -> str | None:
    """The key in ``VLLM_API_KEY``, which vLLM's servers read as well; None if there is none.

    Raises:
        SlebError: it cannot be sent; it is not repeated.
    """
    key = os.environ.get("VLLM_API_KEY") or None
    if key is not None and not (key.isascii() and key.isprintable()):
        raise SlebError("VLLM_API_KEY is not a valid key: give plain ASCII on one line")
    return key


def parse_address(url: str) -> Address:
    """The address that a URL gives.

    Raises:
        SlebError: it is none; credentials in it are not repeated.
    """
    shown = strict_json.short(without_credentials(url))
    example = "give the server's address, as http://localhost:8000"
    if not url.isprintable() or " " in url:
        raise SlebError(f"{shown} contains spaces or control characters; {example}")
    try:
        parts = urllib.parse.urlsplit(url)
        host, port = parts.hostname or "", parts.port
    # Its message may repeat a piece of a password.
    except ValueError:
        raise SlebError(f"{shown} is not a usable address; {example}") from None
    if parts.scheme not in ("http", "https") or not host:
        raise SlebError(f"{shown} is not a server address; {example}")
    # Anywhere: a password with a slash in it ends the host.
    if "@" in url:
        raise SlebError(
            f"{shown} contains a user name or password, which cannot be sent; {example}"
        )
    if parts.query or parts.fragment:
        raise SlebError(f"{shown} contains more than an address (? or #); {example}")
    try:
        # An IPv6 address has colons, and needs no encoding.
        host = host if ":" in host else host.encode("idna").decode()
    except UnicodeError:
        raise SlebError(f"{shown} has no valid host name; {example}") from None
    secure = parts.scheme == "https"
    path = urllib.parse.quote(parts.path.rstrip("/").removesuffix("/v1"), safe="/%~:@!$&'()*+,;=")
    return Address(secure, host, (443 if secure else 80) if port is None else port, path)


def without_credentials(url: str) -> str:
    """A URL without the user name and password in it."""
    return re.sub(r"^([A-Za-z][A-Za-z0-9+.-]*://)?.*@", r"\1***@", url, flags=re.DOTALL)
