"""The threads of one load: those that read, started when there is something for them to do, and one that opens
files where the caller takes tensors meanwhile."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable
from types import TracebackType

from headrace.cache.errors import HeadraceError
from headrace.loader.ranks.exchange import HandOverStopped
from headrace.loader.transfer import Transfer


class Crew:
    """A context manager: however it is left, its threads have ended after it.

    Args:
        transfer: what the threads work for.
        most: threads that read, at most.
    """

    def __init__(self, transfer: Transfer, most: int) -> None:
        self._transfer = transfer
        self._most = most
        self._reading: list[concurrent.futures.Future[None]] = []
        self._pool = concurrent.futures.ThreadPoolExecutor(most + 1, thread_name_prefix="headrace-load")
        transfer.reinforce = self._reinforce

    def __enter__(self) -> Crew:
        return self

    def __exit__(
        self,
        _exc_type: type[BaseException] | None,
        _exc_value: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self._transfer.stop()
        self._pool.shutdown()

    def _reinforce(self, threads: int | None) -> None:
        for _ in range(len(self._reading), min(threads or self._most, self._most)):
            self._reading.append(self._pool.submit(self._transfer.work))

    def beside(self, job: Callable[[], None]) -> concurrent.futures.Future[None]:
        """Run a job in a thread of its own."""
        return self._pool.submit(job)

    def finish(self, opening: Callable[[], None]) -> None:
        """Return when everything is opened and read.

        Args:
            opening: returns when all files were handed to the transfer.

        Raises:
            HeadraceError: the first failure. The opening's comes last: it also fails when a reader did.
        """
        last: list[BaseException] = []
        try:
            opening()
        except HeadraceError as error:
            last.append(error)
        concurrent.futures.wait(self._reading)
        failures = [failure for one in self._reading if (failure := one.exception()) is not None] + last
        for failure in sorted(failures, key=lambda failure: isinstance(failure, HandOverStopped)):
            raise failure
