"""What ranks say to the chief and how it travels: one JSON object a line over TCP, never pickle.

    socket.sendall(encode({"type": "bye", "done": 1}))
    for message in lines.feed(socket.recv(65536)): ...

| from a rank | meaning |
|---|---|
| hello: token, rank, host | opens the connection; anything else first closes it |
| running: what, started, done | entered or left (what is "") a section that needs every rank |
| failed: kind, header, traceback, position, callback, code | this rank cannot go on |
| call: call | a callback of this rank is about to make all ranks do something (`distfit.watch.calls`) |
| place: what, number | the answer to `place?` |
| stalled: what, seconds | this rank has waited for the others for too long |
| stacks: text, waiting, position, callback, ran | the answer to `stacks?` |
| warned: key, text | this rank warns of something, which the chief prints once (`distfit.log`) |
| bye: done | normal end of this rank |

| from the chief | meaning |
|---|---|
| welcome | the token was right |
| everyone: deputy | all ranks are connected; the deputy speaks when the chief vanishes |
| stacks? | where is every thread of yours? |
| place? | what do you wait in? |
| met | all ranks have announced the same call: make it |
| bye: done | the answer to a farewell, or the chief's own |
| end: code | exit with this code, now |
"""

import contextlib
import json
import socket
from typing import Any

MAX_LINE = 1 << 20
MAX_TEXT = 1 << 16

# A dead host sends no end of file. First probe after 2 s of silence, one a second, given up after 4: about
# six seconds, so that the whole job ends within ten.
_KEEPALIVE = (("TCP_KEEPIDLE", 2), ("TCP_KEEPINTVL", 1), ("TCP_KEEPCNT", 4), ("TCP_USER_TIMEOUT", 6000))

Message = dict[str, Any]


def encode(message: Message) -> bytes:
    r"""One line.

    >>> encode({"type": "end", "code": 1})
    b'{"type":"end","code":1}\n'
    """
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def trim(text: str, limit: int = MAX_TEXT) -> str:
    """The head and the (more telling) tail of a text that is too long for a message.

    >>> trim("abcdefgh", limit=4)
    'a\\n... 4 characters left out ...\\nfgh'
    """
    if len(text) <= limit:
        return text
    head = limit // 4
    return f"{text[:head]}\n... {len(text) - limit} characters left out ...\n{text[head - limit :]}"


class Lines:
    r"""Cuts a stream of bytes into messages.

    >>> lines = Lines()
    >>> lines.feed(b'{"type":"bye"}\n{"ty'), lines.feed(b'pe":"end"}\n')
    ([{'type': 'bye'}], [{'type': 'end'}])
    """

    def __init__(self, limit: int = MAX_LINE) -> None:
        self.limit = limit  # bytes of one line
        self._rest = b""

    def feed(self, data: bytes) -> list[Message]:
        """The messages that these bytes complete.

        Raises:
            ValueError: a line is too long, or is no JSON object: whoever speaks is not one of ours.
        """
        *lines, self._rest = (self._rest + data).split(b"\n")
        if max(map(len, [*lines, self._rest])) > self.limit:
            raise ValueError(f"Expected lines of at most {self.limit} bytes, received more.")
        try:
            messages = [json.loads(line) for line in lines]
        except RecursionError as error:
            raise ValueError("Expected a flat JSON object, received a deeply nested one.") from error
        if not all(isinstance(message, dict) for message in messages):
            raise ValueError("Expected one JSON object a line, received something else.")
        return messages


def notice_dead_hosts(connection: socket.socket) -> None:
    """Let the kernel break a connection whose other host is gone, and send each message at once."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE:
        if hasattr(socket, name):
            # A sandboxed kernel may know the option's name and refuse it; end of file still works there.
            with contextlib.suppress(OSError):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
