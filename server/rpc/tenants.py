"""Who may call, what each of them may have, and how much of it is left. Knows no sockets.

The file of API keys is TOML. A key is kept as its SHA-256 alone: keys are random (`lowbit keys`
makes them), so nothing is gained by hashing slowly.

    [tenants.acme]
    keys = ["sha256:…"]              # one or more
    requests_per_minute = 600        # Tokenize and Detokenize count; every limit may be left out
    tokens_per_minute = 100_000      # prompt and completion
    max_concurrent_requests = 32
    max_tokens = 2048                # of one completion
    priority = "normal"              # the highest class that it may ask for, and its default
    weight = 1.0                     # of its share against others of its class
    control = false                  # whether it reaches ControlService
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import math
import re
import secrets
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

from ..config import InvalidConfig
from ..types import MAX_TENANT_CHARACTERS, Priority
from .errors import QuotaExceeded, Unauthenticated

logger = logging.getLogger(__name__)

_HASH: Final = re.compile(r"sha256:[0-9a-f]{64}")
_RELOAD_SECONDS: Final = 1.0  # how often the file is looked at
_MINUTE_SECONDS: Final = 60.0

Metadata = Iterable[tuple[str, str | bytes]]


def new_key() -> str:
    """A random API key."""
    return f"lowbit_{secrets.token_urlsafe(32)}"


def hash_key(key: str) -> str:
    """What the file holds of a key."""
    return f"sha256:{hashlib.sha256(key.encode()).hexdigest()}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """One paragraph of the file. Raises InvalidConfig by setting."""

    name: str
    keys: tuple[str, ...] = ()
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrent_requests: int | None = None
    max_tokens: int | None = None
    priority: Priority = Priority.NORMAL
    weight: float = 1.0
    control: bool = False

    @classmethod
    def from_dict(cls, name: str, settings: Mapping[str, Any]) -> Tenant:
        """Raises InvalidConfig."""
        where = f"tenants.{name}"
        if not 1 <= len(name) <= MAX_TENANT_CHARACTERS:
            raise InvalidConfig(
                f"{where}: a name must have 1 to {MAX_TENANT_CHARACTERS} characters"
            )
        known = {field.name for field in fields(cls)} - {"name"}
        for setting, value in settings.items():
            if setting not in known:
                raise InvalidConfig(f"{where}.{setting} is not known; known are {sorted(known)}")
            _check(f"{where}.{setting}", setting, value)
        given = dict(settings)
        given["keys"] = tuple(given.get("keys", ()))
        if "priority" in given:
            given["priority"] = Priority[given["priority"].upper()]
        return cls(name=name, **given)


def _check(where: str, setting: str, value: object) -> None:
    match setting:
        case "keys":
            holds = isinstance(value, list) and all(
                isinstance(key, str) and _HASH.fullmatch(key) for key in value
            )
            limit = 'must be a list of "sha256:" and 64 hexadecimal digits'
        case "priority":
            holds = isinstance(value, str) and value.upper() in Priority.__members__
            limit = "must be one of high, normal, low"
        case "weight":
            holds = isinstance(value, int | float) and not isinstance(value, bool)
            holds = holds and 0 < float(str(value)) < math.inf
            limit = "must be a positive number"
        case "control":
            holds, limit = isinstance(value, bool), "must be true or false"
        case _:
            holds = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            limit = "must be a whole number of at least 1"
    if not holds:
        raise InvalidConfig(f"{where} is {value!r}; it {limit}")


def read_tenants(path: Path) -> list[Tenant]:
    """Raises InvalidConfig naming the file and the setting."""
    try:
        document = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InvalidConfig(f"api_keys: {path}: {error}") from error
    tables = document.pop("tenants", {})
    if document or not isinstance(tables, dict) or not tables:
        raise InvalidConfig(f"api_keys: {path}: it must hold [tenants.NAME] tables and only those")
    tenants = [Tenant.from_dict(name, settings) for name, settings in tables.items()]
    keys = [key for tenant in tenants for key in tenant.keys]
    if len(set(keys)) < len(keys):
        raise InvalidConfig(f"api_keys: {path}: a key stands in it twice")
    return tenants


class KeyRing:
    """The tenants of a file, read again when it changes. A bad file changes nothing."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._version = _version(path)
        self._tenants = _by_hash(read_tenants(path))
        self._looked_at = time.monotonic()

    def tenant_of(self, metadata: Metadata) -> Tenant:
        """Whose key the `authorization` metadata shows. Raises Unauthenticated."""
        shown = [value for name, value in metadata if name == "authorization"]
        if len(shown) != 1 or not isinstance(shown[0], str):
            raise Unauthenticated("the metadata `authorization: Bearer KEY` is needed, once")
        scheme, _, key = shown[0].partition(" ")
        if scheme.lower() != "bearer":
            raise Unauthenticated(f"authorization is of scheme {scheme[:16]!r}; it must be Bearer")
        self._reload()
        given, found = hash_key(key.strip()), None
        for known, tenant in self._tenants.items():  # all of them: the time tells nothing
            if hmac.compare_digest(given, known):
                found = tenant
        if found is None:
            raise Unauthenticated("the API key is not known")
        return found

    def _reload(self) -> None:
        now = time.monotonic()
        if now - self._looked_at < _RELOAD_SECONDS:
            return
        self._looked_at = now
        version = _version(self._path)
        if version == self._version:
            return
        self._version = version
        try:
            self._tenants = _by_hash(read_tenants(self._path))
            logger.info("read %s again: %d keys", self._path, len(self._tenants))
        except InvalidConfig as error:
            logger.error("the keys stay as they were: %s", error)


def _by_hash(tenants: list[Tenant]) -> dict[str, Tenant]:
    return {key: tenant for tenant in tenants for key in tenant.keys}


def _version(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


class _Allowance:
    """So much a minute, all of which may be taken at once; what is taken comes back evenly."""

    def __init__(self, now: float) -> None:
        self._taken = 0.0
        self._updated = now

    def wait_seconds(self, amount: float, per_minute: float, now: float) -> float:
        """How long until so much may be taken; 0 is now. More than all there is waits for all."""
        self._taken = max(0.0, self._taken - (now - self._updated) * per_minute / _MINUTE_SECONDS)
        self._updated = now
        excess = self._taken + min(amount, per_minute) - per_minute
        return max(0.0, excess * _MINUTE_SECONDS / per_minute)

    def take(self, amount: float) -> None:
        self._taken += amount


class _Account:
    def __init__(self, now: float) -> None:
        self.num_requests = 0
        self.requests = _Allowance(now)
        self.tokens = _Allowance(now)


class Quotas:
    """What each tenant has taken of its limits."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._accounts: dict[str, _Account] = {}

    @contextmanager
    def request(self, tenant: Tenant) -> Iterator[None]:
        """One request for as long as the block lasts. Raises QuotaExceeded."""
        account = self._account(tenant)
        most = tenant.max_concurrent_requests
        if most is not None and account.num_requests >= most:
            raise QuotaExceeded(
                tenant.name,
                f"{account.num_requests} requests are running; max_concurrent_requests is {most}",
                retry_after_seconds=1.0,
            )
        self.take_request(tenant)
        account.num_requests += 1
        try:
            yield
        finally:
            account.num_requests -= 1

    def take_request(self, tenant: Tenant) -> None:
        """Raises QuotaExceeded, and takes nothing, where the minute's are used up."""
        allowance = self._account(tenant).requests
        self._require(tenant, "requests_per_minute", allowance, 1)
        allowance.take(1)

    def take_prompt(self, tenant: Tenant, num_tokens: int) -> None:
        """Raises QuotaExceeded, and takes nothing, where they are more than may be taken now."""
        self._require(tenant, "tokens_per_minute", self._account(tenant).tokens, num_tokens)
        self.take_tokens(tenant, num_tokens)

    def take_tokens(self, tenant: Tenant, num_tokens: int) -> None:
        """Tokens that were made already: a debt where they are more than may be taken now."""
        self._account(tenant).tokens.take(num_tokens)

    def _require(self, tenant: Tenant, limit: str, allowance: _Allowance, amount: int) -> None:
        per_minute = getattr(tenant, limit)
        if per_minute is None:
            return
        wait = allowance.wait_seconds(amount, per_minute, self._clock())
        if wait > 0:
            raise QuotaExceeded(
                tenant.name,
                f"{limit} is {per_minute}, and {amount} more may be had in {wait:.1f} seconds",
                retry_after_seconds=wait,
            )

    def _account(self, tenant: Tenant) -> _Account:
        if tenant.name not in self._accounts:
            self._accounts[tenant.name] = _Account(self._clock())
        return self._accounts[tenant.name]
