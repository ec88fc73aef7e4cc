"""The page's password, and how guessing it is slowed down."""

import pytest

from lowmem_rmu.ui.login import FREE, LONGEST_WAIT, MOST, WINDOW, Login, Throttle


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def throttle(clock: Clock) -> Throttle:
    return Throttle(clock)


def test_both_have_to_be_right() -> None:
    login = Login("mé", "se:crét")
    assert login("mé", "se:crét")
    for user, password in (
        ("mé", "se:cret"),
        ("me", "se:crét"),
        ("", ""),
        ("mé", "se:crét "),
        ("mé", "\udc00"),
    ):
        assert not login(user, password)


def test_the_first_mistakes_are_free_and_then_each_pause_doubles(throttle: Throttle, clock: Clock) -> None:
    for _ in range(FREE):
        assert throttle.begin("10.0.0.1") == 0
    pauses = []
    for _ in range(10):
        pauses.append(throttle.begin("10.0.0.1"))
        clock.now += pauses[-1]
        assert throttle.begin("10.0.0.1") == 0, "then it may"
    assert pauses[:4] == [1, 2, 4, 8]
    assert max(pauses) == LONGEST_WAIT


def test_one_address_does_not_slow_another(throttle: Throttle) -> None:
    for _ in range(FREE):
        throttle.begin("10.0.0.1")
    assert throttle.begin("10.0.0.1") > 0
    assert throttle.begin("10.0.0.2") == 0


def test_an_ipv6_network_counts_as_one_address(throttle: Throttle) -> None:
    for number in range(FREE):
        throttle.begin(f"2001:db8::{number}")
    assert throttle.begin("2001:db8::ffff") > 0
    assert throttle.begin("2001:db8:0:1::1") == 0


def test_many_addresses_together_are_slowed_down_too(throttle: Throttle, clock: Clock) -> None:
    for number in range(MOST):
        assert throttle.begin(f"10.0.{number}.1") == 0
    assert throttle.begin("10.1.0.1") == pytest.approx(WINDOW)
    clock.now += WINDOW + 1
    assert throttle.begin("10.1.0.1") == 0


def test_whom_the_page_knows_is_not_shut_out_by_others(throttle: Throttle) -> None:
    throttle.begin("10.9.9.9")
    throttle.succeeded("10.9.9.9")
    for number in range(MOST):
        throttle.begin(f"10.0.{number}.1")
    assert throttle.begin("10.9.9.9") == 0
    assert throttle.begin("10.9.9.8") > 0


def test_a_right_password_begins_from_zero(throttle: Throttle) -> None:
    for _ in range(20 * FREE):
        assert throttle.begin("10.0.0.1") == 0
        throttle.succeeded("10.0.0.1")


def test_what_is_long_ago_is_forgotten(throttle: Throttle, clock: Clock) -> None:
    for _ in range(FREE + 1):
        throttle.begin("10.0.0.1")
    clock.now += 4000
    for _ in range(FREE):
        assert throttle.begin("10.0.0.1") == 0
    assert list(throttle._tried) == ["10.0.0.1"]
