"""What a node has, for others to see: its trust domains, and its snapshots' manifests and held chunks."""

from __future__ import annotations

import os
import threading

from headrace.cache.errors import HeadraceError, PeerMissing
from headrace.cache.manifest import Manifest
from headrace.cache.numbering import Numbering
from headrace.cache.store import Domain, Store

_MOST = 4
_AT_ONCE = 2


class Shelf:
    """Reads the store; used from any thread."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._domains: dict[str, Domain] = {}
        self._bases: dict[str, str] = {}
        self._manifests: dict[tuple[str, str], tuple[object, Manifest, Numbering]] = {}
        # Parsing a large manifest keeps the interpreter busy; uploads go on beside it.
        self._reading = threading.BoundedSemaphore(_AT_ONCE)

    def domain(self, name: str) -> Domain:
        """
        Raises:
            PeerMissing: this node has no such trust domain.
        """
        found = self._domains.get(name)
        if found is None:
            # Looked for among those there are: the name makes no path.
            found = next((d for d in self._store.domains() if d.name == name), None)
            if found is None:
                raise PeerMissing("this node has no such trust domain.")
            self._domains[name] = found
        return found

    def folder(self, domain: Domain, object_id: str) -> str:
        """The path of an object's folder, as text: making all of `ObjectFolder` costs a third of a small request."""
        base = self._bases.get(domain.name)
        if base is None:
            base = self._bases[domain.name] = os.path.dirname(domain.object(object_id).path)
        return f"{base}/{object_id}"

    def manifest(self, domain: Domain, snapshot_id: str) -> bytes:
        """The stored form.

        Raises:
            PeerMissing: no such snapshot.
        """
        with self._reading:
            return self._read(domain, snapshot_id)[0].to_stored()

    def held(self, domain: Domain, snapshot_id: str) -> bytes:
        """A packed bitmap over the snapshot's chunks (see `Numbering`).

        Raises:
            PeerMissing: no such snapshot.
        """
        with self._reading:
            return self._read(domain, snapshot_id)[1].bitmap(domain)

    def _read(self, domain: Domain, snapshot_id: str) -> tuple[Manifest, Numbering]:
        snapshot = domain.snapshot(snapshot_id)
        key = (domain.name, snapshot_id)
        try:
            status = os.stat(snapshot.path / "manifest.json")
            # It is replaced whole, never changed in place.
            version = (status.st_ino, status.st_mtime_ns)
            with self._lock:
                known = self._manifests.get(key)
            if known is not None and known[0] == version:
                return known[1], known[2]
            manifest = snapshot.manifest()
        except FileNotFoundError:
            raise PeerMissing("this node does not have the snapshot.") from None
        except HeadraceError:
            raise PeerMissing("this node does not have the snapshot, or it is damaged.") from None
        numbering = Numbering.of(manifest, domain.name)
        with self._lock:
            self._manifests.pop(key, None)
            while len(self._manifests) >= _MOST:
                self._manifests.pop(next(iter(self._manifests)))
            self._manifests[key] = (version, manifest, numbering)
        return manifest, numbering
