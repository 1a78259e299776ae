"""Who may use the node, and how much: a tenant, its weight and its limits."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields

from node.config import TenantSettings
from node.errors import RequestError

MAX_WEIGHT = 1000
ANONYMOUS = "anonymous"  # everybody, on a node that has no keys
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True)
class TenantLimits:
    """What a tenant may use. None: no limit.

    Attributes:
        max_concurrent: Generations in progress at once.
        tokens_per_day, tokens_per_month, wei_per_day, wei_per_month: Budgets of the UTC day and month. Tokens are prompt and
            output tokens together; wei is the price of what was served, whoever paid for it.
    """

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrent: int | None = None
    tokens_per_day: int | None = None
    tokens_per_month: int | None = None
    wei_per_day: int | None = None
    wei_per_month: int | None = None


LIMIT_NAMES = tuple(field.name for field in fields(TenantLimits))


@dataclass(frozen=True, slots=True)
class Tenant:
    """One customer of the node. `weight` is its share of the engine among tenants that want it at the same time, 1 to 1000."""

    name: str
    weight: int = 1
    limits: TenantLimits = TenantLimits()


@dataclass(frozen=True, slots=True)
class TenantTerms:
    """What the operator agreed with a tenant. A limit of None takes the node's default, 0 lifts it."""

    name: str
    weight: int = 1
    limits: TenantLimits = TenantLimits()

    def under(self, defaults: TenantSettings) -> Tenant:
        """The tenant as it is treated: its own limits, the node's where it has none."""
        chosen = {}
        for name in LIMIT_NAMES:
            own = getattr(self.limits, name)
            chosen[name] = (getattr(defaults, name) if own is None else own) or None
        return Tenant(self.name, self.weight, TenantLimits(**chosen))


def check_name(name: str) -> str:
    """A name that can be a tenant's.

    Raises:
        RequestError: Malformed, or the name that stands for everybody.
    """
    if not _NAME.fullmatch(name) or name == ANONYMOUS:
        raise RequestError(
            f"tenant name {name[:80]!a} is not usable: write 1 to 64 of A-Z a-z 0-9 . _ - that begin with a letter or "
            f"digit, and not {ANONYMOUS}",
            param="tenant",
        )
    return name


def check_terms(terms: TenantTerms) -> TenantTerms:
    """Terms that can be kept.

    Raises:
        RequestError: The weight or a limit is out of range; the message names it.
    """
    check_name(terms.name)
    if not 1 <= terms.weight <= MAX_WEIGHT:
        raise RequestError(f"weight is {terms.weight}; it must be 1 to {MAX_WEIGHT}", param="weight")
    for name in LIMIT_NAMES:
        value = getattr(terms.limits, name)
        bound = 1 << (200 if name.startswith("wei_") else 62)
        if value is not None and not 0 <= value < bound:
            raise RequestError(f"{name} is {value}; it must be 0 (no limit) to {bound - 1}", param=name)
    return terms
