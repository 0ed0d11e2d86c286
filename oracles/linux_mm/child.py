"""A process under test: it does to its memory what it is told over a socket, and nothing else.

Run as a script, so that it imports little and its own heap stays out of the way. A request is a
letter and three numbers, the answer an errno and a value; a fork comes with the child's socket.
"""

import ctypes
import os
import signal
import socket
import struct
import sys

REQUEST, ANSWER = struct.Struct("<cQQQ"), struct.Struct("<iq")
PAGE = 4096
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
FAILED = ctypes.c_void_p(-1).value


def page_of(content: int, salt: int) -> bytes:
    """A page of this content; salted, so that no page of others is like it."""
    return struct.pack("<QQ", salt, content) * (PAGE // 16) if content else bytes(PAGE)


def _do(letter: bytes, a: int, b: int, c: int) -> tuple[int, int]:
    result: int | None = 0
    ctypes.set_errno(0)
    if letter == b"w":
        ctypes.memmove(a, page_of(b, c), PAGE)
    elif letter == b"r":
        result = ctypes.string_at(a, 1)[0]
    elif letter == b"a":
        result = libc.madvise(a, b, c)
    elif letter == b"p":
        result = libc.mprotect(a, b, c)
    elif letter == b"m":
        result = libc.mmap(None, a, 3, b, -1, 0)
        if result == FAILED:
            return ctypes.get_errno(), 0
    elif letter == b"u":
        result = libc.munmap(a, b)
    if result is None or result < 0:
        return ctypes.get_errno(), 0
    return 0, result


def main() -> None:
    """Serve requests until the socket is closed."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    mine = socket.socket(fileno=int(sys.argv[1]))
    while True:
        request, files, _, _ = socket.recv_fds(mine, REQUEST.size, 1)
        if len(request) < REQUEST.size:
            os._exit(0)
        letter, *numbers = REQUEST.unpack(request)
        if letter == b"x":
            os._exit(0)
        if letter == b"f":
            pid = os.fork()
            if pid == 0:
                mine.close()
                mine = socket.socket(fileno=files[0])
                continue
            os.close(files[0])
            mine.sendall(ANSWER.pack(0, pid))
            continue
        mine.sendall(ANSWER.pack(*_do(letter, *numbers)))


if __name__ == "__main__":
    main()
