"""What a linker makes of peers that end in the middle of an answer, or give another: a line of JSON."""

import json
import socket
import sys
import threading
from types import SimpleNamespace as Fields

from prfaas_cpu.prefix_linker import PrefixLinker
from sglang.srt.mem_cache.hicache_storage import PoolName

K_HEAD = b"HTTP/1.1 200 OK\r\n"
K_WHOLE = b'{"pages": [2], "states": []}'
answers = {
    "whole": K_HEAD + b"\r\n" + K_WHOLE,
    "nothing": b"",
    "half": K_HEAD + b"Content-Length: 99\r\n\r\n" + K_WHOLE,
    "no HTTP": b"220 mail\r\n\r\n",
    "no JSON": K_HEAD + b"\r\n<html>",
}
found = {}
for name, answer in answers.items():
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve(listening: socket.socket = listening, answer: bytes = answer) -> None:
            sock, _ = listening.accept()
            with sock:
                sock.recv(65536)
                sock.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        linker = object.__new__(PrefixLinker)
        linker._peer, linker.pools = f"http://127.0.0.1:{listening.getsockname()[1]}", {}
        try:
            found[name] = linker.lookup("r", [Fields(name=PoolName.KV, keys=["a", "b", "c"])])
        except Exception as error:
            found[name] = repr(error)
sys.stdout.write(json.dumps(found) + "\n")
