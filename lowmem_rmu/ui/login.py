"""The page's password: where it comes from, how it is compared, and how guessing it is slowed down."""

import hashlib
import hmac
import ipaddress
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

FREE = 5
"""Wrong passwords per address before it has to wait."""
LONGEST_WAIT = 300.0
"""Seconds between two attempts at most."""
FORGOTTEN_AFTER = 3600.0
"""Seconds without an attempt after which an address begins from zero."""
MOST = 60
"""Wrong passwords in all within `WINDOW`: addresses are cheap, and behind a proxy they can be made up."""
WINDOW = 600.0


@dataclass(frozen=True)
class Login:
    """Who may use the page; Gradio calls it with what was typed."""

    user: str
    password: str

    def __call__(self, user: str, password: str) -> bool:
        """Compare both in constant time: neither its length nor a right beginning shows in the time it
        takes.
        """
        is_user = hmac.compare_digest(_digest(user), _digest(self.user))
        is_password = hmac.compare_digest(_digest(password), _digest(self.password))
        return is_user and is_password


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


@dataclass
class Tried:
    """Wrong passwords of one address."""

    failures: int = 0
    last: float = 0.0

    def wait(self, now: float) -> float:
        """Return seconds until the next attempt: 1, 2, 4, ... after the free ones."""
        if self.failures < FREE:
            return 0.0
        pause = min(2.0 ** (self.failures - FREE), LONGEST_WAIT)
        return max(0.0, self.last + pause - now)


@dataclass
class Throttle:
    """How soon an address may try a password again."""

    clock: Callable[[], float] = time.monotonic
    _tried: dict[str, Tried] = field(default_factory=dict)
    _known: set[str] = field(default_factory=set)
    _all: deque[float] = field(default_factory=deque)

    def begin(self, address: str) -> float:
        """Count an attempt and give 0; or give the seconds that this address has to wait, and count nothing.

        An attempt counts as wrong until `succeeded` says otherwise, so that many at once cannot slip through.
        """
        now, network = self.clock(), _network(address)
        self._forget(now)
        tried = self._tried.setdefault(network, Tried())
        wait = tried.wait(now)
        # Who has logged in before is not shut out by what others try.
        if not wait and len(self._all) >= MOST and network not in self._known:
            wait = self._all[0] + WINDOW - now
        if wait:
            return max(1.0, wait)
        tried.failures += 1
        tried.last = now
        self._all.append(now)
        return 0.0

    def succeeded(self, address: str) -> None:
        """Take back what was counted for an address whose password was right."""
        network = _network(address)
        self._tried.pop(network, None)
        self._known.add(network)
        if self._all:
            self._all.pop()

    def _forget(self, now: float) -> None:
        while self._all and now - self._all[0] > WINDOW:
            self._all.popleft()
        for network in [name for name, tried in self._tried.items() if now - tried.last > FORGOTTEN_AFTER]:
            del self._tried[network]


def _network(address: str) -> str:
    """Return the part of an address that its owner cannot change at will: of IPv6 the first 64 bits."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address
    return str(ipaddress.ip_network((int(found) >> 64 << 64, 64))) if found.version == 6 else address
