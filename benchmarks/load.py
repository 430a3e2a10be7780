"""`python benchmarks/load.py HOST:PORT FOLDER`: post a folder's JPEGs to a service on this machine.

Closed loop: each connection sends its next request when it has its answer. Open loop (--rate): requests begin at random
moments (Poisson), whether or not earlier ones are answered, and latency counts from the planned moment. Prints one line
of JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from collections import Counter, deque
from pathlib import Path

import uvloop


class Connection(asyncio.Protocol):
    """Sends one request at a time and calls `done(status)` when the answer is complete."""

    def connection_made(self, transport):
        self.transport, self.buffer, self.missing, self.status = transport, b"", None, 0

    def data_received(self, data):
        if self.missing is None:
            self.buffer += data
            head, end, data = self.buffer.partition(b"\r\n\r\n")
            if not end:
                return
            self.buffer, lower = b"", head.lower()
            self.status = int(head[9:12])
            self.missing = int(lower.partition(b"content-length:")[2].partition(b"\r\n")[0])
        self.missing -= len(data)
        if self.missing <= 0:
            self.missing = None
            self.done(self.status)

    def connection_lost(self, _):
        self.done(0)


def requests(paths, route, images):
    """Yield one POST per file, a multipart form of this file and the next ones: `images` files together."""
    for i in range(len(paths)):
        body = b""
        for path in (paths[(i + j) % len(paths)] for j in range(images)):
            part = f'--b0undary\r\nContent-Disposition: form-data; name="files"; filename="{path.name}"\r\n\r\n'
            body += part.encode() + path.read_bytes() + b"\r\n"
        body += b"--b0undary--\r\n"
        head = f"POST {route} HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=b0undary\r\n"
        yield head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body


async def load(host, port, messages, connections, seconds, rate):
    """Return sorted latencies in seconds, the count of each status, and the duration in seconds."""
    loop = asyncio.get_running_loop()
    latencies, statuses = [], Counter()
    end = time.perf_counter() + seconds
    idle, waiting, ended = [], deque(), asyncio.Event()
    busy = 0
    pick = iter(lambda: random.choice(messages), None)

    def send(connection, begun):
        nonlocal busy
        busy += 1

        def done(status):
            nonlocal busy
            busy -= 1
            now = time.perf_counter()
            latencies.append(now - begun)
            statuses[status] += 1
            connection.done = lambda status: None
            if not status:  # the connection is gone: one less
                pass
            elif rate is None and now < end:
                send(connection, now)
            elif waiting:
                send(connection, waiting.popleft())
            else:
                idle.append(connection)
            if not busy:
                ended.set()

        connection.done = done
        connection.transport.write(next(pick))

    made = [await loop.create_connection(Connection, host, port) for _ in range(connections)]
    started = time.perf_counter()
    for _, connection in made:
        connection.done = lambda status: None
        if rate is None:
            send(connection, time.perf_counter())
        else:
            idle.append(connection)
    if rate is not None:
        moment = time.perf_counter()
        while True:
            moment += random.expovariate(rate)
            if moment >= end:
                break
            if (wait := moment - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            if idle:
                send(idle.pop(), moment)
            else:
                waiting.append(moment)
    while busy:
        ended.clear()
        await asyncio.wait_for(ended.wait(), seconds + 60)
    took = time.perf_counter() - started
    for transport, _ in made:
        transport.abort()
    return sorted(latencies), statuses, took


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--route", default="/v1/embed")
    parser.add_argument("--images", type=int, default=1, help="per request")
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--rate", type=float, help="requests per second; without it the loop is closed")
    arguments = parser.parse_args()
    host, _, port = arguments.address.partition(":")
    if host not in ("127.0.0.1", "localhost", "[::1]"):
        parser.error("only services on this machine")
    messages = list(requests(sorted(arguments.folder.rglob("*.jp*g"))[:256], arguments.route, arguments.images))
    random.seed(0)
    given = host, int(port), messages, arguments.connections, arguments.seconds, arguments.rate
    latencies, statuses, took = uvloop.run(load(*given))
    ranks = {
        f"p{p}": round(1000 * latencies[min(len(latencies) * p // 100, len(latencies) - 1)], 2) for p in (50, 95, 99)
    }
    print(json.dumps({"rate": round(len(latencies) / took, 1), **ranks, "statuses": dict(statuses)}))


if __name__ == "__main__":
    main()
