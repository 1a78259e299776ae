"""What tenants use, held against their limits: rates and places in memory, budgets also in the ledger.

A generation reserves the most it can use before it runs, and gives back the rest when its books are closed. So a tenant can be
refused although its requests would have fitted in the end, and never gets more than its limit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from node.errors import OverloadedError, PaymentError
from node.tenancy.buckets import MinuteBucket
from node.tenancy.tenant import Tenant, TenantLimits

_UNITS = ("tokens", "wei")
_PERIODS = ("day", "month")


@dataclass(slots=True)
class Usage:
    """Tokens and wei of one UTC day and of the month it lies in."""

    day: str
    tokens_per_day: int = 0
    tokens_per_month: int = 0
    wei_per_day: int = 0
    wei_per_month: int = 0

    def turn(self, day: str) -> None:
        """Begin another day."""
        if day == self.day:
            return
        self.tokens_per_day = self.wei_per_day = 0
        if day[:7] != self.day[:7]:
            self.tokens_per_month = self.wei_per_month = 0
        self.day = day

    def add(self, tokens: int, wei: int) -> None:
        """Book what was served."""
        self.tokens_per_day += tokens
        self.tokens_per_month += tokens
        self.wei_per_day += wei
        self.wei_per_month += wei


@dataclass(frozen=True, slots=True)
class TokenPrice:
    """Wei per token."""

    input_wei: int = 0
    output_wei: int = 0

    def fee_wei(self, input_tokens: int, output_tokens: int) -> int:
        """What these tokens cost."""
        return input_tokens * self.input_wei + output_tokens * self.output_wei


@dataclass(slots=True)
class _Account:
    """One tenant's state. `held` is what generations in progress may still use."""

    usage: Usage
    concurrent: int = 0
    held: dict[str, int] = field(default_factory=lambda: {"tokens": 0, "wei": 0})
    requests: MinuteBucket | None = None
    tokens: MinuteBucket | None = None


class Visit:
    """One generation of one tenant: `reserve` before it runs, `settle` when its books are closed."""

    def __init__(self, meter: Meter, tenant: Tenant) -> None:
        self._meter = meter
        self._tenant = tenant
        self._reserved = (0, 0)

    def reserve(self, tokens: int, wei: int) -> None:
        """Hold the most that this generation can use.

        Raises:
            OverloadedError: rate_limit_exceeded, tokens a minute. PaymentError: budget_exceeded.
        """
        self._meter.hold(self._tenant, tokens, wei)
        self._reserved = (tokens, wei)

    def settle(self, tokens: int, wei: int) -> None:
        """Book what was used, as the record has it, and give back the rest. Only the first call counts."""
        reserved, self._reserved = self._reserved, (0, 0)
        if reserved != (0, 0):
            self._meter.book(self._tenant, reserved, (tokens, wei))


class Meter:
    """Counts and refuses. Belongs to one event loop. Accounts are as many as tenants, which the operator makes.

    Args:
        clock: Monotonic seconds, for rates. now: UTC, for budgets.
        used: What tenants used this month before this process, by tenant.
    """

    def __init__(
        self, clock: Callable[[], float], now: Callable[[], datetime], used: Callable[[str], Usage | None] = lambda _: None
    ) -> None:
        self._clock = clock
        self._now = now
        self._used = used
        self._accounts: dict[str, _Account] = {}

    def count_request(self, tenant: Tenant) -> None:
        """One more request.

        Raises:
            OverloadedError: rate_limit_exceeded.
        """
        bucket = self._buckets(tenant).requests
        if bucket is None:
            return
        wait_s = bucket.wait_s(1)
        if wait_s:
            raise OverloadedError(
                f"the limit of {bucket.per_minute} requests a minute is reached; wait, or ask the node's operator for more",
                code="rate_limit_exceeded",
                retry_after_s=wait_s,
            )
        bucket.take(1)

    @contextmanager
    def entered(self, tenant: Tenant) -> Iterator[Visit]:
        """Hold one of the tenant's places.

        Raises:
            OverloadedError: concurrency_limit.
        """
        account, limit = self._account(tenant), tenant.limits.max_concurrent
        if limit is not None and account.concurrent >= limit:
            raise OverloadedError(
                f"{account.concurrent} requests of this tenant are in progress, its limit is {limit}; wait for one to end",
                code="concurrency_limit",
                retry_after_s=1.0,
            )
        account.concurrent += 1
        visit = Visit(self, tenant)
        try:
            yield visit
        finally:
            account.concurrent -= 1
            visit.settle(0, 0)

    def hold(self, tenant: Tenant, tokens: int, wei: int) -> None:
        """See `Visit.reserve`."""
        account = self._buckets(tenant)
        self._check_budgets(account, tenant.limits, {"tokens": tokens, "wei": wei})
        bucket = account.tokens
        if bucket is not None:
            wait_s = bucket.wait_s(tokens)
            if wait_s is None or wait_s > 0:
                raise OverloadedError(
                    f"this request may take {tokens} tokens and {bucket.remaining} are left of {bucket.per_minute} a minute; "
                    + ("ask for fewer" if wait_s is None else "wait, or ask for fewer"),
                    code="rate_limit_exceeded",
                    retry_after_s=wait_s,
                )
            bucket.take(tokens)
        account.held["tokens"] += tokens
        account.held["wei"] += wei

    def book(self, tenant: Tenant, reserved: tuple[int, int], used: tuple[int, int]) -> None:
        """See `Visit.settle`."""
        account = self._account(tenant)
        account.held["tokens"] -= reserved[0]
        account.held["wei"] -= reserved[1]
        account.usage.add(*used)
        if account.tokens is not None:
            account.tokens.give_back(max(0, reserved[0] - used[0]))

    def headers(self, tenant: Tenant) -> Mapping[str, str]:
        """What is left of the rates, in OpenAI's spelling; nothing for a tenant without such limits."""
        account, lines = self._buckets(tenant), {}
        for name, bucket in (("requests", account.requests), ("tokens", account.tokens)):
            if bucket is not None:
                lines[f"x-ratelimit-limit-{name}"] = str(bucket.per_minute)
                lines[f"x-ratelimit-remaining-{name}"] = str(max(0, bucket.remaining))
                lines[f"x-ratelimit-reset-{name}"] = f"{bucket.full_s:.3f}s"
        return lines

    def usage(self, tenant: str) -> Usage:
        """What a tenant used today and this month."""
        return self._account(Tenant(tenant)).usage

    def _check_budgets(self, account: _Account, limits: TenantLimits, wanted: Mapping[str, int]) -> None:
        for unit in _UNITS:
            for period in _PERIODS:
                limit = getattr(limits, f"{unit}_per_{period}")
                left = None if limit is None else limit - getattr(account.usage, f"{unit}_per_{period}") - account.held[unit]
                if left is not None and wanted[unit] > left:
                    raise PaymentError(
                        f"this request may take {wanted[unit]} {unit} and {max(0, left)} are left of this tenant's {limit} a "
                        f"{period} (UTC); ask for fewer tokens, or the node's operator for more",
                        code="budget_exceeded",
                        retry_after_s=_until_next(period, self._now()),
                    )

    def _account(self, tenant: Tenant) -> _Account:
        day = self._now().date().isoformat()
        account = self._accounts.get(tenant.name)
        if account is None:
            account = self._accounts[tenant.name] = _Account(self._used(tenant.name) or Usage(day))
        account.usage.turn(day)
        return account

    def _buckets(self, tenant: Tenant) -> _Account:
        """The account, with buckets of today's limits: one that changed starts full."""
        account, limits = self._account(tenant), tenant.limits
        account.requests = self._bucket(account.requests, limits.requests_per_minute)
        account.tokens = self._bucket(account.tokens, limits.tokens_per_minute)
        return account

    def _bucket(self, bucket: MinuteBucket | None, per_minute: int | None) -> MinuteBucket | None:
        if per_minute is None or (bucket is not None and bucket.per_minute == per_minute):
            return None if per_minute is None else bucket
        return MinuteBucket(per_minute, self._clock)


def _until_next(period: str, now: datetime) -> float:
    """Seconds until the next UTC day or month."""
    today = now.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    following = today + timedelta(days=1) if period == "day" else (today.replace(day=1) + timedelta(days=32)).replace(day=1)
    return (following - now).total_seconds()
