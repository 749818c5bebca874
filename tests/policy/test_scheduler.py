"""One rule each of what a node asks, fetches and says."""

from __future__ import annotations

from itertools import pairwise
from math import inf

import pytest
from support.scheduled import FAR, ME, NEAR, asked, fetches, finish, held, scheduler, without_pauses

from headrace.cache.errors import UsageError
from headrace.cache.policy.fetch import Fetch, Outcome
from headrace.cache.policy.limits import Limits
from headrace.cache.tracker.protocol import MAX_WANTED, Answer

SMALL = Limits(window=0.1, least_window=1)


class TestOrder:
    def test_only_the_window_is_asked_about(self) -> None:
        one = scheduler(100, limits=Limits(window=0.1, least_window=1, downloads=64))
        assert sorted(asked(one, 0.0).wanted) == list(range(10))

    def test_the_plan_gives_the_order(self) -> None:
        one = scheduler(100, order=range(99, -1, -1), limits=Limits(window=0.1, least_window=1, downloads=64))
        assert sorted(asked(one, 0.0).wanted) == list(range(90, 100))

    def test_what_the_plan_leaves_out_is_not_fetched(self) -> None:
        one = scheduler(100, order=[5, 7])
        request = asked(one, 0.0)
        assert sorted(request.wanted) == [5, 7]
        one.unanswered(request, 0.0)
        finish(one, 10.0)

    def test_nodes_ask_in_different_orders(self) -> None:
        wide = Limits(window=1.0, downloads=16)
        orders = {tuple(asked(scheduler(seed=seed, limits=wide), 0.0).wanted) for seed in range(10)}
        assert len(orders) == 10

    def test_one_seed_gives_one_order(self) -> None:
        assert asked(scheduler(seed=4), 0.0).wanted == asked(scheduler(seed=4), 0.0).wanted

    def test_the_rarest_are_fetched_first(self) -> None:
        one = scheduler(limits=Limits(window=1.0, downloads=16, per_peer=16))
        request = asked(one, 0.0)
        counts = {chunk: place % 5 + 1 for place, chunk in enumerate(request.wanted)}
        one.answered(request, held(request.wanted, *NEAR, counts=counts), 0.0)
        begun = [counts[fetch.chunk] for fetch in one.start(0.0)]
        assert begun == sorted(begun)
        assert len(begun) == 16

    def test_not_all_rush_to_the_few_holders_of_a_chunk(self) -> None:
        first = set()
        for seed in range(40):
            one = scheduler(seed=seed, limits=Limits(window=1.0, downloads=16))
            request = asked(one, 0.0)
            rare, *common = request.wanted
            counts = {**dict.fromkeys(common, 60), rare: 1}
            one.answered(request, held(request.wanted, *NEAR, counts=counts), 0.0)
            first.add(one.start(0.0)[0].chunk == rare)
        assert first == {True, False}

    def test_readers_come_first_wherever_the_window_is(self) -> None:
        one = scheduler(limits=SMALL)
        one.want([95, 96])
        request = asked(one, 0.0)
        assert set(request.wanted[:2]) == {95, 96}
        one.answered(request, held(request.wanted, *NEAR, counts=dict.fromkeys(request.wanted, 1)), 0.0)
        assert {fetch.chunk for fetch in one.start(0.0)[:2]} == {95, 96}

    def test_readers_may_want_what_the_plan_leaves_out(self) -> None:
        one = scheduler(order=[0, 1])
        one.present([0, 1], 0.0)
        assert one.complete
        one.want([50])
        assert not one.complete
        request = asked(one, 0.0)
        assert request.wanted == [50]
        one.answered(request, held([50], *NEAR), 0.0)
        (fetch,) = one.start(0.0)
        one.finished(fetch, Outcome.DONE, 0.1)
        assert one.complete

    def test_the_window_moves_only_with_its_start(self) -> None:
        one = scheduler(limits=Limits(window=0.1, least_window=1, downloads=64))
        request = asked(one, 0.0)
        one.answered(request, Answer(counts={}), 0.0)
        one.present(range(1, 10), 0.0)
        assert 10 not in (one.ask(1.0) or request).wanted
        one = scheduler(limits=Limits(window=0.1, least_window=1, downloads=64))
        one.present(range(9), 0.0)
        assert sorted(asked(one, 0.0).wanted) == list(range(9, 19))

    def test_a_chunk_whose_reader_is_gone_does_not_hold_the_window(self) -> None:
        one = scheduler(limits=Limits(window=0.1, least_window=1, downloads=64, poll=0.01, most_poll=0.01))
        one.present(range(1, 5), 0.0)
        seen: set[int] = set()
        now = 0.0
        for _ in range(2000):
            request = one.ask(now)
            if request is not None:
                seen.update(request.wanted)
                # Chunk 0 is read by somebody who has died. The others are read for a moment, then there are holders.
                if now > 0.05:
                    ready = [chunk for chunk in request.wanted if chunk]
                    one.answered(request, Answer(dict.fromkeys(ready, NEAR), (), (0,)), now)
                else:
                    one.answered(request, Answer(reading=tuple(request.wanted)), now)
            for fetch in one.start(now):
                one.finished(fetch, Outcome.DONE, now)
            now += 0.01
        assert seen == {0, *range(5, 100)}
        assert not one.complete


class TestAsking:
    def test_one_exchange_at_a_time(self) -> None:
        one = scheduler()
        request = asked(one, 0.0)
        assert one.ask(100.0) is None
        one.answered(request, Answer(), 0.0)
        assert one.ask(100.0) is not None

    def test_a_batch_is_not_larger_than_may_be_asked(self) -> None:
        one = scheduler(1000, limits=Limits(window=1.0, downloads=200))
        assert len(asked(one, 0.0).wanted) == MAX_WANTED

    def test_known_sources_are_not_asked_for_again(self) -> None:
        one = scheduler(limits=without_pauses(Limits(downloads=4)))
        request = asked(one, 0.0)
        one.answered(request, held(request.wanted, *NEAR), 0.0)
        begun = one.start(0.0)
        again = one.ask(0.0)
        assert again is None or not set(again.wanted) & {fetch.chunk for fetch in begun}

    def test_gains_are_announced_soon_even_when_nothing_is_wanted(self) -> None:
        one = scheduler(1)
        (fetch,) = fetches(one, 0.0, NEAR[0])
        one.finished(fetch, Outcome.DONE, 1.0)
        assert one.wake(1.0) <= 1.05
        assert list(asked(one, 1.05).gained) == [0]

    def test_gains_are_announced_soon_while_much_is_wanted(self) -> None:
        one = scheduler()
        fetch = fetches(one, 0.0, NEAR[0])[0]
        one.finished(fetch, Outcome.DONE, 1.0)
        assert fetch.chunk in asked(one, 1.05).gained

    def test_what_many_have_may_wait_for_company(self) -> None:
        one = scheduler(limits=Limits(window=1.0, downloads=16, per_peer=16))
        request = asked(one, 0.0)
        one.answered(request, held(request.wanted, *NEAR, counts=dict.fromkeys(request.wanted, 5000)), 0.0)
        fetch = one.start(0.0)[0]
        one.finished(fetch, Outcome.DONE, 0.01)
        assert one.ask(0.1) is None
        assert fetch.chunk in asked(one, 0.01 + Limits().most_announce).gained

    def test_questions_that_bring_nothing_become_rarer(self) -> None:
        one = scheduler()
        times, now = [], 0.0
        while now < 5.0:
            if (request := one.ask(now)) is not None:
                times.append(now)
                one.answered(request, Answer(reading=tuple(request.wanted)), now)
            now = max(now + 1e-6, one.wake(now))
        pauses = [later - sooner for sooner, later in pairwise(times)]
        assert pauses[0] <= 0.05
        assert 0.05 < sum(pauses[-5:]) / 5 <= 1.5 * Limits().most_poll
        assert len(set(pauses[-5:])) == 5

    def test_all_nodes_together_ask_only_so_often(self) -> None:
        one = scheduler(10_000, limits=Limits(least_window=5000))
        request = asked(one, 0.0)
        one.answered(request, held(request.wanted, *NEAR, counts=dict.fromkeys(request.wanted, 100_000)), 0.0)
        calls, now = 0, 0.0
        while now < 10.0:
            for fetch in one.start(now):
                one.finished(fetch, Outcome.DONE, now)
            if (again := one.ask(now)) is not None:
                calls += 1
                one.answered(
                    again, held(again.wanted, *NEAR, counts=dict.fromkeys(again.wanted, 100_000)), now
                )
            now += 0.001
        assert calls < 10 / (Limits().most_crowded * 0.4)

    def test_a_tracker_that_is_gone_is_asked_again_after_longer_and_longer_pauses(self) -> None:
        one = scheduler(2)
        one.present([0], 0.0)
        times, now = [], 0.0
        while now < 20.0:
            request = one.ask(now)
            if request is not None:
                times.append(now)
                assert list(request.gained) == [0]
                assert list(request.wanted) == [1]
                one.unanswered(request, now)
            now = max(now + 1e-6, one.wake(now))
        pauses = [later - sooner for sooner, later in pairwise(times)]
        assert pauses[0] <= 0.2
        assert 1.0 <= pauses[-1] <= 3.0
        assert not one.start(now)

    def test_what_was_lost_meanwhile_is_not_announced_as_gained(self) -> None:
        one = scheduler(2)
        one.present([0, 1], 0.0)
        request = asked(one, 0.0)
        one.absent([0], 0.1)
        one.unanswered(request, 0.1)
        again = asked(one, 10.0)
        assert (list(again.gained), list(again.lost), list(again.wanted)) == ([1], [0], [0])

    def test_done_means_announced(self) -> None:
        one = scheduler(3)
        one.present(range(3), 0.0)
        assert one.complete
        assert not one.done
        request = asked(one, 0.0)
        assert not one.done
        one.answered(request, Answer(), 0.1)
        assert one.done
        assert one.ask(1e6) is None
        assert one.wake(0.2) == inf

    def test_an_empty_plan_is_done_at_once(self) -> None:
        assert scheduler(5, order=[]).done


class TestClaims:
    def test_without_a_claim_the_origin_is_not_read(self) -> None:
        one = scheduler()
        request = asked(one, 0.0)
        one.answered(request, Answer(counts=dict.fromkeys(request.wanted, 0)), 0.0)
        assert one.start(0.0) == []

    def test_a_claimed_chunk_is_read_from_the_origin(self) -> None:
        one = scheduler()
        request = asked(one, 0.0)
        assert request.claims == Limits().first_claims
        chunk = request.wanted[0]
        one.answered(request, Answer(claimed=(chunk,)), 0.0)
        assert [(fetch.chunk, fetch.peer) for fetch in one.start(0.0)] == [(chunk, None)]

    def test_claims_are_kept_while_reading_goes_on(self) -> None:
        one = scheduler(1)
        request = asked(one, 0.0)
        one.answered(request, Answer(claimed=(0,)), 0.0)
        (fetch,) = one.start(0.0)
        kept, now = [], 0.0
        while now < 30.0:
            now = one.wake(now)
            request = asked(one, now)
            assert list(request.keep) == [0]
            kept.append(now)
            one.answered(request, Answer(), now)
        assert max(later - sooner for sooner, later in zip([0.0, *kept], kept, strict=False)) < 5.0
        one.finished(fetch, Outcome.DONE, now)
        assert not asked(one, now).keep

    def test_a_claim_that_is_not_needed_is_given_back(self) -> None:
        one = scheduler()
        request = asked(one, 0.0)
        chunk = request.wanted[0]
        one.present([chunk], 0.0)
        one.answered(request, Answer(claimed=(chunk,)), 0.0)
        assert one.start(0.0) == []
        assert list(asked(one, 0.1).give_back) == [chunk]

    def test_a_claim_whose_reading_failed_is_given_back_and_the_origin_rests(self) -> None:
        one = scheduler(limits=without_pauses())
        request = asked(one, 0.0)
        one.answered(request, Answer(claimed=(request.wanted[0],), reading=tuple(request.wanted[1:])), 0.0)
        (fetch,) = one.start(0.0)
        one.finished(fetch, Outcome.FAILED, 0.0)
        soon = asked(one, 0.01)
        assert list(soon.give_back) == [fetch.chunk]
        assert soon.claims == 0
        one.answered(soon, Answer(), 0.01)
        assert asked(one, 2.0).claims == 1

    def test_more_claims_are_asked_for_while_they_bring_more(self) -> None:
        one = scheduler(1000, limits=Limits(claims=8, least_window=1000))
        most, now = 0, 0.0
        flying: list[tuple[float, Fetch]] = []
        while now < 60 and most < 8:
            request = one.ask(now)
            if request is not None:
                most = max(most, request.claims + len(flying))
                granted = tuple(request.wanted[: request.claims])
                rest = tuple(request.wanted[request.claims :])
                one.answered(request, Answer(claimed=granted, reading=rest), now)
            flying += [(now + 0.5, fetch) for fetch in one.start(now)]
            assert len(flying) <= 8
            for at, fetch in [pair for pair in flying if pair[0] <= now]:
                one.finished(fetch, Outcome.DONE, now)
                flying.remove((at, fetch))
            now += 0.01
        assert most == 8


class TestTransfers:
    def test_limits_hold_in_all_and_for_one_peer(self) -> None:
        one = scheduler(limits=Limits(window=1.0, downloads=8, per_peer=3))
        assert len(fetches(one, 0.0, NEAR[0])) == 3
        one = scheduler(limits=Limits(window=1.0, downloads=8, per_peer=3))
        assert len(fetches(one, 0.0, *NEAR)) == 8

    def test_the_next_begins_when_one_ends(self) -> None:
        one = scheduler(limits=Limits(window=1.0, downloads=8, per_peer=1))
        (fetch,) = fetches(one, 0.0, NEAR[0])
        one.finished(fetch, Outcome.DONE, 0.1)
        (following,) = one.start(0.1)
        assert following.chunk != fetch.chunk

    def test_a_busy_peer_is_left_for_another_holder(self) -> None:
        one = scheduler(1)
        (fetch,) = fetches(one, 0.0, *NEAR[:2])
        assert one.finished(fetch, Outcome.BUSY, 0.001, 4) == []
        (following,) = one.start(0.001)
        assert following.peer != fetch.peer

    def test_where_all_are_busy_there_is_a_pause(self) -> None:
        one = scheduler(1)
        (fetch,) = fetches(one, 0.0, NEAR[0])
        one.finished(fetch, Outcome.BUSY, 0.001, 4)
        assert one.start(0.001) == []
        again = one.wake(0.001)
        assert 0.001 < again < 0.5
        assert list(asked(one, again).wanted) == [0]

    def test_a_lie_is_reported_and_another_holder_asked(self) -> None:
        one = scheduler(1)
        (fetch,) = fetches(one, 0.0, *NEAR[:2])
        assert fetch.peer is not None
        one.finished(fetch, Outcome.MISSING, 0.001)
        assert list(asked(one, 0.001).missing) == [(0, fetch.peer.id)]
        (following,) = one.start(0.001)
        assert following.peer != fetch.peer

    def test_wrong_bytes_are_reported_so_that_the_chunk_can_be_claimed(self) -> None:
        one = scheduler(1)
        (fetch,) = fetches(one, 0.0, NEAR[0])
        one.finished(fetch, Outcome.CORRUPT, 0.001)
        assert list(asked(one, 0.001).missing) == [(0, NEAR[0].id)]
        assert one.start(0.001) == []

    def test_far_peers_only_where_no_near_one_has_it(self) -> None:
        one = scheduler(1)
        (fetch,) = fetches(one, 0.0, *FAR, NEAR[2])
        assert fetch.peer == NEAR[2]

    def test_a_transfer_that_ends_twice_ends_once(self) -> None:
        one = scheduler(1)
        (fetch,) = fetches(one, 0.0, NEAR[0])
        one.finished(fetch, Outcome.DONE, 0.1)
        one.finished(fetch, Outcome.FAILED, 0.2)
        assert one.complete

    def test_what_came_by_another_way_is_not_fetched(self) -> None:
        one = scheduler(2, limits=Limits(downloads=1))
        (fetch,) = fetches(one, 0.0, NEAR[0])
        one.present([1 - fetch.chunk], 0.0)
        one.finished(fetch, Outcome.CANCELLED, 0.1)
        (following,) = fetches(one, 1.0, NEAR[0])
        assert following.chunk == fetch.chunk

    def test_what_another_stager_has_taken_is_left_to_it_until_it_is_freed(self) -> None:
        one = scheduler(2)
        one.taken([0], 0.0)
        request = asked(one, 0.0)
        assert list(request.wanted) == [1]
        one.answered(request, held([1], NEAR[0]), 0.0)
        (fetch,) = one.start(0.0)
        one.finished(fetch, Outcome.DONE, 0.1)
        assert not one.complete
        one.absent([0], 0.2)
        assert 0 in asked(one, 1.0).wanted

    def test_what_is_taken_back_is_announced_and_fetched_again(self) -> None:
        one = scheduler(3)
        one.present(range(3), 0.0)
        one.answered(asked(one, 0.0), Answer(), 0.0)
        one.absent([1], 1.0)
        request = asked(one, 1.0)
        assert (list(request.lost), list(request.wanted)) == ([1], [1])
        assert not one.done
        one.answered(request, Answer(claimed=(1,)), 1.0)
        finish(one, 1.0, one.start(1.0))


class TestSecondTries:
    def test_a_slow_transfer_gets_a_second_try_elsewhere(self) -> None:
        one = scheduler(1)
        (fetch,) = fetches(one, 0.0, *NEAR[:2])
        assert one.start(0.5) == []
        at = one.wake(0.5)
        assert at < inf
        (second,) = one.start(at)
        assert (second.hedges, second.chunk) == (fetch.number, fetch.chunk)
        assert second.peer not in (fetch.peer, None)
        assert one.start(at + 100) == []

    @pytest.mark.parametrize("winner", [0, 1])
    def test_the_loser_is_cancelled(self, winner: int) -> None:
        one = scheduler(1)
        (fetch,) = fetches(one, 0.0, *NEAR[:2])
        (second,) = one.start(one.wake(0.0))
        both = [fetch, second]
        assert one.finished(both[winner], Outcome.DONE, 9.0) == [both[1 - winner]]
        assert one.finished(both[1 - winner], Outcome.CANCELLED, 9.0) == []
        assert one.complete

    def test_one_of_two_that_fails_leaves_it_to_the_other(self) -> None:
        one = scheduler(1)
        (fetch,) = fetches(one, 0.0, *NEAR[:3])
        (second,) = one.start(one.wake(0.0))
        one.finished(second, Outcome.FAILED, 9.0)
        assert one.start(9.0) == []
        one.finished(fetch, Outcome.FAILED, 9.1)
        (third,) = one.start(9.1)
        assert third.peer not in (fetch.peer, second.peer)

    def test_the_origin_is_never_the_second(self) -> None:
        one = scheduler(1)
        (fetch,) = fetches(one, 0.0, NEAR[0])
        now, seen = 0.0, []
        while now < 60.0:
            now = max(now + 1e-6, one.wake(now))
            request = one.ask(now)
            if request is not None:
                seen += list(request.wanted)
                one.answered(request, Answer(claimed=tuple(request.wanted[: request.claims])), now)
            assert one.start(now) == []
        assert set(seen) == {fetch.chunk}

    def test_a_holder_that_is_found_meanwhile_is_used(self) -> None:
        one = scheduler(1)
        (fetch,) = fetches(one, 0.0, NEAR[0])
        at = one.wake(0.0)
        assert one.start(at) == []
        request = asked(one, at)
        assert list(request.wanted) == [0]
        one.answered(request, held([0], NEAR[1]), at)
        (second,) = one.start(one.wake(at))
        assert second.peer == NEAR[1]
        assert second.hedges == fetch.number

    def test_no_other_holder_is_looked_for_when_the_chunk_is_here_meanwhile(self) -> None:
        one = scheduler(2)
        fetches(one, 0.0, NEAR[0])
        at = one.wake(0.0)
        assert one.start(at) == []
        one.present([0], at)
        request = asked(one, at)
        assert list(request.gained) == [0]
        assert list(request.wanted) == [1]

    def test_reading_the_origin_has_no_second_try(self) -> None:
        one = scheduler(1)
        one.answered(asked(one, 0.0), Answer(claimed=(0,)), 0.0)
        one.start(0.0)
        assert one.start(1e6) == []

    def test_what_nobody_waits_for_has_no_second_try(self) -> None:
        one = scheduler(1, limits=Limits(demand=False))
        fetches(one, 0.0, *NEAR[:2])
        assert one.start(1e6) == []

    def test_what_somebody_comes_to_wait_for_has_them_from_then_on(self) -> None:
        one = scheduler(2, limits=Limits(demand=False))
        first, other = fetches(one, 0.0, *NEAR[:2])
        assert one.start(100.0) == []
        one.set_demand(True)
        # Those that are late already are so at once.
        assert one.wake(100.0) == 100.0
        (second,) = one.start(100.0)
        assert second.hedges in (first.number, other.number)
        assert second.peer not in (first.peer if second.hedges == first.number else other.peer, None)

    def test_what_nobody_waits_for_any_more_has_none_from_then_on(self) -> None:
        one = scheduler(1)
        fetches(one, 0.0, *NEAR[:2])
        one.set_demand(False)
        assert one.start(1e6) == []
        assert one.wake(1e6) == inf

    def test_few_transfers_get_a_second_try(self) -> None:
        one = scheduler(2000, limits=without_pauses(Limits(window=1.0, least_window=2000)))
        begun = seconds = 0
        flying: list[Fetch] = []
        now = 0.0
        while not one.complete:
            request = one.ask(now)
            if request is not None:
                one.answered(request, held(request.wanted, *NEAR), now)
            new = one.start(now)
            begun += len(new)
            seconds += sum(fetch.hedges is not None for fetch in new)
            flying += new
            # Everything is slow.
            now += 100.0
            if not new:
                fetch = flying.pop(0)
                for loser in one.finished(fetch, Outcome.DONE, now):
                    flying.remove(loser)
                    one.finished(loser, Outcome.CANCELLED, now)
        assert 0 < seconds <= 2 + 0.05 * begun


@pytest.mark.parametrize(
    "wrong", [{"window": 0.0}, {"window": 2.0}, {"batch": MAX_WANTED + 1}, {"downloads": 0}, {"claims": 0}]
)
def test_limits_that_make_no_sense_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        Limits(**wrong)  # type: ignore[arg-type]


def test_a_node_alone_ends() -> None:
    finish(scheduler(3000), 0.0)


def test_the_node_itself_is_no_source() -> None:
    one = scheduler(1)
    assert fetches(one, 0.0, ME) == []
