"""Run as a script inside a site, with the standard library alone.

listen PATH…   hold unix sockets there (one line on stdout once they listen) until stdin ends
reach PATH…    which of these paths a socket can connect to, as JSON
"""

import json
import os
import socket
import sys


def listen(paths: list[str]) -> None:
    held = []
    for path in paths:
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(path)
        sock.listen()
        held.append(sock)
    sys.stdout.write("listening\n")
    sys.stdout.flush()
    sys.stdin.read()
    for path in paths:
        os.unlink(path)


def reach(paths: list[str]) -> None:
    found = []
    for path in paths:
        with socket.socket(socket.AF_UNIX) as sock:
            try:
                sock.connect(path)
            except OSError:
                continue
            found.append(path)
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    {"listen": listen, "reach": reach}[sys.argv[1]](sys.argv[2:])
