import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.errors import OverloadedError, PaymentError
from node.tenancy.buckets import MinuteBucket
from node.tenancy.meter import Meter, TokenPrice, Usage
from node.tenancy.tenant import Tenant, TenantLimits


def tenant(**limits):
    return Tenant("acme", 1, TenantLimits(**limits))


def use(meter, who, reserved, used):
    with meter.entered(who) as visit:
        visit.reserve(*reserved)
        visit.settle(*used)


@given(st.lists(st.tuples(st.integers(1, 30), st.floats(0, 5)), max_size=60), st.integers(1, 30))
def test_bucket_never_gives_more_than_its_rate_and_one_minute(steps, per_minute):
    now, given_out = [0.0], 0
    bucket = MinuteBucket(per_minute, lambda: now[0])
    for amount, pause_s in steps:
        now[0] += pause_s
        wait_s = bucket.wait_s(amount)
        assert (wait_s is None) == (amount > per_minute)
        if wait_s == 0:
            bucket.take(amount)
            given_out += amount
        elif wait_s is not None:
            now[0] += wait_s + 1e-6
            assert bucket.wait_s(amount) == 0
    assert given_out <= per_minute + now[0] * per_minute / 60 + 1e-6


def test_requests_a_minute_are_refused_with_the_time_to_wait(meter, clock):
    who = tenant(requests_per_minute=2)
    meter.count_request(who)
    meter.count_request(who)
    with pytest.raises(OverloadedError) as caught:
        meter.count_request(who)
    assert (caught.value.error_code, caught.value.retry_after_s) == ("rate_limit_exceeded", 30.0)
    clock.pass_s(30)
    meter.count_request(who)


def test_tokens_that_were_reserved_and_not_used_come_back(meter):
    who = tenant(tokens_per_minute=100)
    use(meter, who, (100, 0), (10, 0))
    use(meter, who, (90, 0), (90, 0))
    with pytest.raises(OverloadedError) as caught:
        use(meter, who, (1, 0), (1, 0))
    assert caught.value.retry_after_s == pytest.approx(0.6)
    with pytest.raises(OverloadedError) as caught:
        use(meter, who, (101, 0), (1, 0))
    assert caught.value.retry_after_s is None


def test_headers_tell_what_is_left(meter):
    who = tenant(requests_per_minute=60, tokens_per_minute=100)
    meter.count_request(who)
    use(meter, who, (50, 0), (40, 0))
    headers = meter.headers(who)
    assert headers["x-ratelimit-limit-requests"] == "60"
    assert headers["x-ratelimit-remaining-requests"] == "59"
    assert headers["x-ratelimit-reset-requests"] == "1.000s"
    assert headers["x-ratelimit-remaining-tokens"] == "60"
    assert meter.headers(tenant()) == {}


def test_places_are_given_back_whatever_happens(meter):
    who = tenant(max_concurrent=1)
    with meter.entered(who), pytest.raises(OverloadedError) as caught, meter.entered(who):
        pass
    assert caught.value.error_code == "concurrency_limit"
    with pytest.raises(ValueError, match="broken"), meter.entered(who):
        raise ValueError("broken")
    with meter.entered(who):
        pass


@pytest.mark.parametrize(
    ("limit", "wait_s"),
    [("tokens_per_day", 12 * 3600), ("tokens_per_month", 12 * 3600), ("wei_per_day", 12 * 3600), ("wei_per_month", 12 * 3600)],
)
def test_budget_is_402_until_its_period_is_over(meter, clock, limit, wait_s):
    who = tenant(**{limit: 100})
    use(meter, who, (100, 100), (60, 60))
    with pytest.raises(PaymentError) as caught:
        use(meter, who, (41, 41), (1, 1))
    assert (caught.value.error_code, caught.value.retry_after_s) == ("budget_exceeded", wait_s)
    assert "40" in caught.value.message
    clock.pass_s(wait_s)  # the month ends with the day
    use(meter, who, (100, 100), (100, 100))
    clock.pass_s(24 * 3600)
    if limit.endswith("month"):
        with pytest.raises(PaymentError) as caught:
            use(meter, who, (1, 1), (1, 1))
        assert caught.value.retry_after_s == 27 * 24 * 3600
    else:
        use(meter, who, (100, 100), (100, 100))


def test_generations_in_progress_count_with_the_most_they_may_use(meter):
    who = tenant(tokens_per_day=100)
    with meter.entered(who) as first:
        first.reserve(60, 0)
        with meter.entered(who) as second, pytest.raises(PaymentError):
            second.reserve(60, 0)
    with meter.entered(who) as third:
        third.reserve(100, 0)


def test_use_before_a_restart_counts(clock):
    meter = Meter(clock.monotonic, clock.now, lambda name: Usage("2026-01-31", 30, 80) if name == "acme" else None)
    use(meter, tenant(tokens_per_day=100, tokens_per_month=150), (70, 0), (70, 0))
    with pytest.raises(PaymentError):
        use(meter, tenant(tokens_per_month=150), (1, 0), (1, 0))


def test_changed_rate_takes_effect_at_the_next_request(meter):
    meter.count_request(tenant(requests_per_minute=1))
    with pytest.raises(OverloadedError):
        meter.count_request(tenant(requests_per_minute=1))
    meter.count_request(tenant(requests_per_minute=5))
    meter.count_request(tenant())


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), max_size=40), st.integers(1, 200))
def test_budget_is_never_exceeded(asks, limit):
    from datetime import UTC, datetime

    meter = Meter(lambda: 0.0, lambda: datetime(2026, 1, 1, tzinfo=UTC))
    who = tenant(tokens_per_day=limit)
    for reserved, used in asks:
        try:
            use(meter, who, (reserved, 0), (min(reserved, used), 0))
        except PaymentError:
            assert meter.usage("acme").tokens_per_day + reserved > limit
        assert meter.usage("acme").tokens_per_day <= limit


def test_price_is_tokens_times_wei():
    assert TokenPrice(2, 3).fee_wei(10, 100) == 320
