"""Tokens: they prove one request, of one node to one other, once and for a minute."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.cache.errors import NotAuthenticated, PeerBusy
from headrace.cache.peers import tokens
from headrace.cache.peers.security import Secret
from headrace.cache.peers.tokens import WINDOW, Replays

NOW = 1_800_000_000.0
MINE, OTHER = Secret.of("one secret of sixteen"), Secret.of("another secret, longer")
HOST, PATH = "10.0.0.5:7070", "/v1/default/objects/" + 64 * "a" + "/chunks/0-4"


def check(token: str | None, *, host: str = HOST, path: str = PATH, method: str = "GET") -> None:
    tokens.check(token, (MINE,), method, host, path, NOW, Replays())


def token(now: float = NOW, secret: Secret = MINE) -> str:
    return tokens.make(secret, "GET", HOST, PATH, now)


def test_a_token_proves_its_request() -> None:
    check(token())


@pytest.mark.parametrize("difference", [-WINDOW + 1, 0.0, WINDOW - 1])
def test_clocks_may_differ_a_little(difference: float) -> None:
    check(token(NOW + difference))


@pytest.mark.parametrize(
    ("difference", "said"), [(-93.0, "93 s behind"), (61.0, "61 s ahead"), (-86400.0, "86400 s behind")]
)
def test_a_clock_that_is_wrong_is_told_by_how_much(difference: float, said: str) -> None:
    with pytest.raises(NotAuthenticated, match=said):
        check(token(NOW + difference))


@pytest.mark.parametrize(
    "change",
    [
        {"path": PATH.replace("0-4", "0-5")},
        {"path": PATH.replace("default", "tenant")},
        {"path": PATH.replace("chunks", "digests")},
        {"host": "10.0.0.6:7070"},
        {"method": "HEAD"},
    ],
    ids=str,
)
def test_a_token_is_of_no_use_for_another_request(change: dict[str, str]) -> None:
    with pytest.raises(NotAuthenticated, match="does not belong"):
        check(token(), **change)


@given(st.data())
def test_no_part_of_a_token_can_be_changed(data: st.DataObject) -> None:
    parts = token().split(" ")
    which = data.draw(st.integers(0, 4))
    before = parts[which]
    parts[which] = data.draw(
        st.one_of(
            st.text(st.characters(codec="latin-1", exclude_characters=" "), max_size=70),
            st.builds(
                lambda at, c: before[:at] + c + before[at + 1 :],
                st.integers(0, len(before) - 1),
                st.sampled_from("0a9.Z"),
            ),
        ).filter(lambda text: text != before)
    )
    with pytest.raises(NotAuthenticated):
        check(" ".join(parts))


@pytest.mark.parametrize(
    "text", [None, "", "Basic dXNlcjpwYXNz", "Headrace-2 a b c d", "Headrace-1", "Headrace-1 a b c"]
)
def test_what_is_no_token_is_refused(text: str | None) -> None:
    with pytest.raises(NotAuthenticated):
        check(text)


def test_a_token_of_another_secret_is_refused_by_its_key_id_only() -> None:
    with pytest.raises(NotAuthenticated) as caught:
        check(token(secret=OTHER))
    assert OTHER.id in str(caught.value)
    assert "another secret" not in str(caught.value)


@pytest.mark.parametrize("order", [(MINE, OTHER), (OTHER, MINE)], ids=["first", "second"])
def test_any_of_several_secrets_is_accepted(order: tuple[Secret, ...]) -> None:
    tokens.check(token(), order, "GET", HOST, PATH, NOW, Replays())


def test_a_token_counts_once_for_as_long_as_it_lives() -> None:
    replays = Replays()
    # Made by a clock that is ahead: it lives until WINDOW after its time.
    one = token(NOW + WINDOW - 1)
    tokens.check(one, (MINE,), "GET", HOST, PATH, NOW, replays)
    for later in range(0, int(2 * WINDOW) + 60, 7):
        # Others keep the memory turning over.
        tokens.check(token(NOW + later), (MINE,), "GET", HOST, PATH, NOW + later, replays)
        with pytest.raises(NotAuthenticated):
            tokens.check(one, (MINE,), "GET", HOST, PATH, NOW + later, replays)


def test_the_memory_for_replays_is_bounded_and_refuses_rather_than_forgets() -> None:
    replays = Replays(most=10)
    first = [b"%016d" % n for n in range(10)]
    for nonce in first:
        replays.note(nonce, NOW)
    with pytest.raises(PeerBusy):
        replays.note(b"one too many", NOW)
    for nonce in first:
        with pytest.raises(NotAuthenticated):
            replays.note(nonce, NOW + 1)
    replays.note(b"later, when some of the first are too old", NOW + 2 * WINDOW)
    for nonce in first:
        with pytest.raises(NotAuthenticated):
            replays.note(nonce, NOW + 2 * WINDOW)
