"""To how many nodes one chunk goes at once."""

from __future__ import annotations

from headrace.cache.policy.uploads import SLOW, TOGETHER, Uploads


def test_quick_uploads_go_to_all_that_ask() -> None:
    uploads = Uploads()
    for _ in range(50):
        assert not uploads.full("a", 1.0)
        uploads.begin("a", 1.0)
    for _ in range(50):
        uploads.end("a", 1.0, 1.0 + SLOW / 2, whole=True)
    uploads.begin("a", 2.0)
    uploads.begin("a", 2.0)
    assert not uploads.full("a", 2.0 + SLOW / 2)


def test_who_uploads_slowly_gives_a_chunk_to_two_at_once_and_another_chunk_to_others() -> None:
    uploads = Uploads()
    for _ in range(TOGETHER):
        assert not uploads.full("a", 0.0)
        uploads.begin("a", 0.0)
    assert uploads.full("a", SLOW * 1.01)  # no upload has ended yet
    assert not uploads.full("b", SLOW * 1.01)
    uploads.end("a", 0.0, 10.0, whole=True)
    assert not uploads.full("a", 10.0)
    uploads.begin("a", 10.0)
    assert uploads.full("a", 10.0)
    uploads.begin("b", 10.0)
    uploads.begin("b", 10.0)
    assert uploads.full("b", 10.0)  # it is known by now


def test_slow_receivers_do_not_make_a_slow_sender() -> None:
    uploads = Uploads()
    for number in range(6):
        uploads.begin(number, 0.0)
        uploads.end(number, 0.0, 20.0 if number else SLOW / 2, whole=True)
    uploads.begin("a", 20.0)
    uploads.begin("a", 20.0)
    assert not uploads.full("a", 40.0)


def test_an_upload_that_was_broken_off_says_nothing_of_the_speed() -> None:
    uploads = Uploads()
    uploads.begin("a", 0.0)
    uploads.end("a", 0.0, 100.0, whole=False)
    assert uploads.seconds < SLOW
