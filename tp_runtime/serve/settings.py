"""The settings of a server, which are checked once."""

from __future__ import annotations

import ipaddress
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import RequestError, require_flag, require_positive, shown


@dataclass(frozen=True)
class ServerSettings:
    """What a server accepts, and how much of it.

    Attributes:
        host: the address to listen on.
        port: the port; 0 takes a free one.
        api_keys: the keys of which a request has to send one; none means that every request is served.
        patch_dir: the folder whose patch files are loaded and watched.
        manage_patches: whether /v1/patches loads and unloads patches of `patch_dir`.
        origins: the origins whose pages may call the server from a browser; its own page needs none.
        host_names: further names by which clients call the server, such as that of a proxy in front of it.
        rows: the largest number of requests that run at the same time.
        queue: the largest number of requests that wait.
        timeout: the seconds that a request may take, waiting included.
        drain: the seconds that running requests get to end after SIGTERM.
        stall: the seconds after which a client is given up that does not send its body, or takes nothing of an answer.
        body_bytes: the largest size of a request's body.
        max_tokens: the largest number of new tokens of a request, and the number if the request names none.

    Raises:
        RequestError: a value is not valid, or the server would be open to other machines without a key.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: Sequence[str] = ()
    patch_dir: Path | None = None
    manage_patches: bool = False
    origins: Sequence[str] = ()
    host_names: Sequence[str] = ()
    rows: int = 8
    queue: int = 64
    timeout: float = 300.0
    drain: float = 30.0
    stall: float = 30.0
    body_bytes: int = 4 * 2**20
    max_tokens: int = 1024

    def __post_init__(self) -> None:
        for name in ("rows", "queue", "body_bytes", "max_tokens"):
            require_positive(name, getattr(self, name))
        for name in ("timeout", "drain", "stall"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise RequestError(
                    "the value is not a duration", field=name, got=shown(value), wanted="seconds, above 0"
                )
        require_flag("manage_patches", self.manage_patches)
        if type(self.port) is not int or not 0 <= self.port < 65536:
            raise RequestError("the port is not valid", field="port", got=shown(self.port), wanted="0 to 65535")
        for key in self.api_keys:
            if not isinstance(key, str) or len(key) < _SHORTEST_KEY or not key.isascii() or not key.isprintable():
                raise RequestError(
                    "the key is not safe",
                    field="api_key",
                    got="a key that is not shown",
                    wanted=f"at least {_SHORTEST_KEY} printable ASCII characters",
                )
        if not self.api_keys and not is_loopback(self.host):
            raise RequestError(
                "the server would serve other machines without a key",
                field="host",
                got=self.host,
                wanted="127.0.0.1, or an API key",
                fix="set --api-key-file or the environment variable TP_API_KEY",
            )
        if self.manage_patches and self.patch_dir is None:
            raise RequestError(
                "there is no folder whose patches could be loaded",
                field="manage_patches",
                got="True",
                wanted="--patch-dir DIR",
            )


_SHORTEST_KEY = 8


def is_loopback(host: str) -> bool:
    """Return whether only programs of this machine reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
