"""A staging job that the node's agent does, for a client that goes on by itself if the agent goes away."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from headrace.cache import signature
from headrace.cache.bandwidth import Class
from headrace.cache.config import Config
from headrace.cache.errors import AgentUnavailable, HeadraceError, Interrupted
from headrace.cache.prepare import StageRequest
from headrace.cache.progress import Progress
from headrace.cache.reference import parse
from headrace.cache.staging import StagingJob
from headrace.cache.store import Store
from headrace.prefetch import messages
from headrace.prefetch.client import AgentClient


class _Gone(Exception):
    """The agent has left before the job was done."""


class RemoteJob(StagingJob):
    """To its user a staging job like any other; the staging is the agent's.

    Closing it (`cancel`) lets the agent know at once: unless others wait for the same, the agent stops.
    """

    def __init__(
        self,
        client: AgentClient,
        request: StageRequest,
        progress: Progress,
        settings: Config,
        root: Path,
        *,
        of: Class = "demand",
    ) -> None:
        """
        Args:
            settings: this user's configuration: what it asks for is asked of the agent.
            root: the store, as this process sees it.

        Raises:
            Unsuited: the agent would do something else than this process.
            HeadraceError: the agent cannot be asked, or refuses.
        """
        super().__init__(request, progress, settings=settings)
        self._domain = request.domain or settings.domain
        self._root = root
        self._turn = threading.Lock()
        self._cancelled = self._alone = False
        self._stream = client.stream(
            "POST",
            "/v1/stage",
            {"request": _spelled_out(request, settings), "origin": _origin(request, settings), "class": of},
        )

    def _main(self) -> None:
        try:
            self._follow()
        except (_Gone, AgentUnavailable):
            with self._turn:
                self._alone = not self._cancelled
        except HeadraceError as error:
            self._error = error
        except BaseException as error:  # noqa: BLE001  (handed to the waiting thread, which raises it)
            self._error = error
        if self._alone:
            self.progress.note("the agent has gone, so this process goes on by itself.")
            # What the agent brought is found present, and was counted already.
            self.progress.present = -sum(self.progress.fetched.values())
            super()._main()
            return
        if self._cancelled:
            self._error = Interrupted(
                "staging was interrupted; what arrived is kept, and the next run resumes."
            )
        self._ended.set()
        self.prepared.set()

    def _follow(self) -> None:
        """Take in what the agent says until the job has ended."""
        counted = messages.Counted(self.progress)
        for said in self._stream:
            if "progress" in said:
                counted.take(said["progress"])
            elif "opened" in said:
                self._open(said["opened"])
            elif "report" in said:
                self._take_report(said["report"])
                return
            elif said.get("stopping"):
                raise _Gone
            elif "error" in said:
                raise messages.error_from_json(said["error"])
        raise _Gone

    def _open(self, opened: Mapping[str, str]) -> None:
        with Store.open(self._root, writable=False) as store:
            domain = store.domain(opened["domain"])
        self.opened = domain, domain.snapshot(opened["snapshot"])
        self.prepared.set()

    def _take_report(self, values: Mapping[str, Any]) -> None:
        report = messages.report_from_json(values)
        with Store.open(self._root, writable=False) as store:
            domain = store.domain(self._domain)
        self.opened = domain, domain.snapshot(report.snapshot)
        # As this process calls them: the agent may see the store at another path.
        self._report = replace(report, reference=self.request.reference, path=str(self.opened[1].files))

    def cancel(self) -> None:
        with self._turn:
            self._cancelled = True
        if self._alone:
            super().cancel()
            return
        self._stream.close()
        self._thread.join()


def _spelled_out(request: StageRequest, settings: Config) -> dict[str, Any]:
    """The request with everything that this user's configuration says, as the agent's may say something else."""
    reference = parse(request.reference)
    requirement = settings.rule(reference).requirement
    keys = [signature.public_key(key) for key in request.keys] or list(requirement.keys)
    levels = {request.require, requirement.level}
    return messages.request_to_json(
        replace(
            request,
            reference=str(reference),
            domain=request.domain or settings.domain,
            revalidate=request.revalidate or settings.revalidate,
            require="signed" if "signed" in levels else "published" if "published" in levels else None,
            keys=tuple(keys),
            workers=settings.workers if request.workers is None else request.workers,
        )
    )


def _origin(request: StageRequest, settings: Config) -> dict[str, Any]:
    """How this process would talk to the origin, as far as it decides what is meant."""
    options = asdict(settings.options(parse(request.reference)))
    return {name: options[name] for name in messages.SAME_ORIGIN}
