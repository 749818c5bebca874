"""What every command shares: its options, where its output goes, and the store it works on.

Standard output carries the result and nothing else: with `--json` exactly one JSON object. What a
person may want to know besides goes to standard error.
"""

from __future__ import annotations

import contextlib
import functools
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from headrace.cli.units import parse_size

if TYPE_CHECKING:
    from headrace.cache.config import Config
    from headrace.cache.snapshot import Snapshot
    from headrace.cache.store import Domain, Store


@dataclass(frozen=True, slots=True)
class Invocation:
    """The shared options of one call."""

    root: str | None
    domain: str | None
    as_json: bool
    quiet: bool

    def emit(self, result: Mapping[str, Any], text: str) -> None:
        """Write the result: the object with --json, else the text (none when empty)."""
        if self.as_json:
            sys.stdout.write(json.dumps(result, ensure_ascii=False) + "\n")
        elif text:
            sys.stdout.write(text + "\n")
        sys.stdout.flush()

    def say(self, text: str) -> None:
        """Tell the user something that is not the result, unless --quiet."""
        if not self.quiet:
            to_stderr(f"headrace: {text}")

    def settings(self) -> Config:
        """The configuration file. Raises UsageError."""
        from headrace.cache import config

        return config.load()

    @contextlib.contextmanager
    def store(self, *, writable: bool) -> Iterator[Store]:
        """The store that --root, the configuration or the environment names.

        Raises:
            HeadraceError: as `Store.open`.
        """
        from headrace.cache.store import Store

        with Store.open(self.root or self.settings().root, writable=writable) as store:
            yield store

    def domain_of(self, store: Store) -> Domain:
        """The trust domain that --domain or the configuration names."""
        return store.domain(self.domain or self.settings().domain)

    def find(self, store: Store, text: str) -> tuple[Domain, Snapshot]:
        """A snapshot by its id, the start of it, or a reference as a user types it.

        Raises:
            NotStaged: none, or several.
        """
        from headrace.cache.errors import NotStaged, UsageError
        from headrace.cache.reference import parse

        domain = self.domain_of(store)
        try:
            return domain, domain.find(text)
        except NotStaged:
            with contextlib.suppress(NotStaged, UsageError):
                return domain, domain.find(str(parse(text)))
            raise


def to_stderr(text: str) -> None:
    """A line on standard error; a closed one is no reason to stop."""
    with contextlib.suppress(BrokenPipeError):
        print(text, file=sys.stderr, flush=True)


def shared(function: Callable[..., None]) -> Callable[..., None]:
    """Add the options that every command has; they arrive as an `Invocation`, the first argument."""

    @click.option(
        "--root", metavar="DIR", help="The store. [default: $HEADRACE_ROOT, the node's, or the user's]"
    )
    @click.option("--domain", metavar="NAME", help="The trust domain. [default: 'default']")
    @click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
    @click.option("--quiet", "-q", is_flag=True, help="No progress and no remarks on standard error.")
    @functools.wraps(function)
    def wrapped(
        *args: Any, root: str | None, domain: str | None, as_json: bool, quiet: bool, **options: Any
    ) -> None:
        function(Invocation(root, domain, as_json, quiet), *args, **options)

    return wrapped


def size_option(name: str, description: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """An option that takes a size such as 16MiB (see `units.parse_size`) and arrives as bytes."""

    def convert(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
        return None if value is None else parse_size(value)

    return click.option(name, metavar="SIZE", callback=convert, help=description)


def stored_names(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Shell completion: references and snapshot ids in the store."""
    from headrace.cache.errors import HeadraceError

    call = Invocation(ctx.params.get("root"), ctx.params.get("domain"), False, True)
    try:
        with call.store(writable=False) as store:
            snapshots = list(call.domain_of(store).snapshots())
            names = {name.reference for snapshot in snapshots for name in snapshot.names()}
    except HeadraceError:
        return []
    return sorted(n for n in names | {s.id[:12] for s in snapshots} if n.startswith(incomplete))
