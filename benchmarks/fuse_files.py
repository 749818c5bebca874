"""A FUSE mount of one folder of files, in a process of its own: `with served(folder, point): ...`

The raw protocol of /dev/fuse, read-only, flat, with the kernel's page cache kept and reads of up to 1 MiB;
two threads answer. Needs root.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# include/uapi/linux/fuse.h
_IN = struct.Struct("<IIQQIIIHH")
_OUT = struct.Struct("<IiQ")
_INIT_IN = struct.Struct("<IIII")
_INIT_OUT = struct.Struct("<IIIIHHIIHH32x")
_ATTR = struct.Struct("<6Q10I")
_ENTRY_OUT = struct.Struct("<4Q2I")
_ATTR_OUT = struct.Struct("<QII")
_OPEN_OUT = struct.Struct("<QIi")
_READ_IN = struct.Struct("<QQI")
_STATFS_OUT = struct.Struct("<5Q4I24x")
_DIRENT = struct.Struct("<QQII")
_LOOKUP, _FORGET, _GETATTR, _OPEN, _READ, _STATFS, _RELEASE = 1, 2, 3, 14, 15, 17, 18
_FLUSH, _INIT, _OPENDIR, _READDIR, _RELEASEDIR, _INTERRUPT, _BATCH_FORGET = 25, 26, 27, 28, 29, 36, 42
_NO_REPLY = (_FORGET, _INTERRUPT, _BATCH_FORGET)
_ASYNC_READ, _MAX_PAGES = 1 << 0, 1 << 22
_KEEP_CACHE = 1 << 1
_REQUEST = 1 << 20
_SECONDS = 3600  # that names and attributes may be remembered


class FuseFiles:
    """Answers the kernel's requests. Node 1 is the folder, node n + 2 its n-th file."""

    def __init__(self, device: int, folder: Path) -> None:
        self._device = device
        self._paths = sorted(path for path in folder.iterdir() if path.is_file())
        self._numbers = {os.fsencode(path.name): number + 2 for number, path in enumerate(self._paths)}
        self._descriptors = [os.open(path, os.O_RDONLY) for path in self._paths]

    def serve(self) -> None:
        """Until it is unmounted."""
        buffer = bytearray(_REQUEST)
        while True:
            try:
                request = os.read(self._device, _REQUEST + 4096)
            except OSError as error:
                if error.errno == errno.ENODEV:
                    return
                if error.errno in (errno.EINTR, errno.ENOENT):  # a request that was taken back
                    continue
                raise
            _, opcode, unique, node, *_ = _IN.unpack_from(request)
            if opcode in _NO_REPLY:
                continue
            failed, body = 0, memoryview(b"")
            try:
                body = self._answer(opcode, node, request[_IN.size :], buffer)
            except OSError as error:
                failed = -(error.errno or errno.EIO)
            try:
                os.writev(self._device, [_OUT.pack(_OUT.size + len(body), failed, unique), body])
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ENODEV):  # nobody waits for it any more
                    raise

    def _answer(self, opcode: int, node: int, body: bytes, buffer: bytearray) -> memoryview:
        if opcode == _READ:
            _, offset, size = _READ_IN.unpack_from(body)
            count = os.preadv(self._descriptors[node - 2], [memoryview(buffer)[:size]], offset)
            return memoryview(buffer)[:count]
        if opcode == _INIT:
            _, minor, ahead, offered = _INIT_IN.unpack_from(body)
            flags = offered & (_ASYNC_READ | _MAX_PAGES)
            pages = _REQUEST // 4096
            return memoryview(_INIT_OUT.pack(7, min(minor, 31), ahead, flags, 64, 48, _REQUEST, 1, pages, 0))
        if opcode == _LOOKUP:
            number = self._numbers.get(body.rstrip(b"\0"))
            if number is None:
                raise OSError(errno.ENOENT, "no such file")
            return memoryview(_ENTRY_OUT.pack(number, 0, _SECONDS, _SECONDS, 0, 0) + self._attributes(number))
        if opcode == _GETATTR:
            return memoryview(_ATTR_OUT.pack(_SECONDS, 0, 0) + self._attributes(node))
        if opcode == _OPEN:
            return memoryview(_OPEN_OUT.pack(0, _KEEP_CACHE, 0))
        if opcode == _OPENDIR:
            return memoryview(_OPEN_OUT.pack(0, 0, 0))
        if opcode == _READDIR:
            _, offset, size = _READ_IN.unpack_from(body)
            return memoryview(self._entries(offset, size))
        if opcode == _STATFS:
            return memoryview(_STATFS_OUT.pack(0, 0, 0, len(self._paths), 0, 4096, 255, 4096, 0))
        if opcode in (_RELEASE, _RELEASEDIR, _FLUSH):
            return memoryview(b"")
        raise OSError(errno.ENOSYS, "not served")

    def _attributes(self, node: int) -> bytes:
        if node == 1:
            mode, size = stat.S_IFDIR | 0o755, 0
        else:
            mode, size = stat.S_IFREG | 0o444, os.fstat(self._descriptors[node - 2]).st_size
        blocks = -(-size // 512)
        return _ATTR.pack(node, size, blocks, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)

    def _entries(self, offset: int, size: int) -> bytes:
        found = b""
        for name, number in list(self._numbers.items())[offset:]:
            entry = _DIRENT.pack(number, number - 1, len(name), stat.S_IFREG >> 12) + name
            entry += b"\0" * (-len(entry) % 8)
            if len(found) + len(entry) > size:
                break
            found += entry
        return found


def _run(folder: Path, point: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other,max_read={_REQUEST}".encode()
    if libc.mount(b"headrace-bench", os.fsencode(point), b"fuse.headrace", 1 | 2 | 4, options) != 0:
        raise OSError(ctypes.get_errno(), "cannot mount", str(point))
    files = FuseFiles(device, folder)
    threads = [threading.Thread(target=files.serve) for _ in range(2)]
    for thread in threads:
        thread.start()
    print("mounted", flush=True)
    for thread in threads:
        thread.join()


@contextmanager
def served(folder: Path, point: Path) -> Iterator[Path]:
    """Mount `folder` at `point` for the block.

    Raises:
        OSError: it cannot be mounted.
    """
    point.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, str(folder), str(point)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        if process.stdout.readline().strip() != "mounted":
            raise OSError(f"no FUSE mount: {process.stderr.read()[-300:]}")
        device = point.stat().st_dev
        ahead = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
        try:
            if ahead.exists():  # the kernel offers 128 KiB, whatever is asked for
                ahead.write_text(str(_REQUEST >> 10))
            yield point
        finally:
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.umount2(os.fsencode(point), 0) != 0:
                libc.umount2(os.fsencode(point), 2)  # still in use: detached, and the server ends with it
                process.kill()


if __name__ == "__main__":
    _run(Path(sys.argv[1]), Path(sys.argv[2]))
