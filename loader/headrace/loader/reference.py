"""From what the user wrote to a `Source`: the one place where the loader reaches for the cache.

The import is lazy: loading from a directory needs no object store library, and importing the loader must
stay cheap inside the inference process.
"""

from __future__ import annotations

import os
from typing import Any

from headrace.cache.errors import NotFound
from headrace.loader.source import DirectorySource, Source


def open_source(
    src: str | os.PathLike[str],
    *,
    root: str | None = None,
    domain: str | None = None,
    progress: Any = None,
) -> Source:
    """Open a model for loading: a path that exists as it is, anything else as a model reference.

    An archive, which has to be unpacked, is a reference wherever it lies; a stream directory stands for the
    snapshot that it names.

    Args:
        src: a directory, a file, or a model reference such as "s3://bucket/model".
        root: the store; by default as the command line chooses it.
        domain: the trust domain.
        progress: handed to the stager.

    Raises:
        NotFound: a path that does not exist.
        HeadraceError: whatever resolving and staging the reference raises.
    """
    text = os.fspath(src)
    packed = False
    if os.path.isfile(text) and not text.endswith((".safetensors", ".json")):  # the import takes 20 ms
        from headrace.cache.selection import ARCHIVES

        packed = text.endswith(ARCHIVES)
    if os.path.exists(text) and not packed:
        if is_stream_directory(text):
            from headrace.cache.stream_directory import open_stream_directory

            return open_stream_directory(text, root=root, domain=domain, progress=progress)
        return DirectorySource(text)
    if not packed and (not isinstance(src, str) or ":" not in text):
        raise NotFound(f"{text} does not exist: give a directory, a .safetensors file or a model reference")
    from headrace.cache.staging import open_for_loading

    source: Source = open_for_loading(text, root=root, domain=domain, progress=progress)
    return source


def is_stream_directory(location: str | os.PathLike[str]) -> bool:
    """Whether a directory says where its weights come from (see `headrace.cache.stream_directory`)."""
    return os.path.isfile(os.path.join(location, "snapshot.json"))
