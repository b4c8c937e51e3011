"""A TCP proxy that lets every byte arrive later, or none at all: without rights over the machine's network."""

import asyncio
import threading
import time
from urllib.parse import urlsplit

CHUNK = 2**18
# What may be on the way in one direction of one connection, in chunks; TCP holds back the rest.
ON_THE_WAY = 256
START_S = 10.0


class SlowLink:
    """`address` leads to `target`, both tcp://host:port; a context manager. `round_trip_s` may change at any time."""

    def __init__(self, target: str, round_trip_s: float = 0.0) -> None:
        parts = urlsplit(target)
        self.host, self.port = parts.hostname or "127.0.0.1", parts.port or 0
        self.round_trip_s = round_trip_s
        self.address = ""
        self._lives = 0
        self._writers: list[asyncio.StreamWriter] = []
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="slow-link", daemon=True)

    def __enter__(self) -> "SlowLink":
        self._thread.start()
        if not self._ready.wait(START_S):
            raise TimeoutError("the slow link did not start")
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(START_S)

    def vanish(self) -> None:
        """What is connected stays so, and nothing goes through it any more. Who connects anew is served."""
        self._lives += 1

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._connected, "127.0.0.1", 0))
        self.address = "tcp://{}:{}".format(*server.sockets[0].getsockname())
        self._ready.set()
        self._loop.run_forever()
        server.close()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        for writer in self._writers:
            writer.close()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.close()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there_reader, there_writer = await asyncio.open_connection(self.host, self.port)
        self._writers += [writer, there_writer]
        await asyncio.gather(self._carry(reader, there_writer), self._carry(there_reader, writer))

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One direction; half of the round trip's delay lies here."""
        on_the_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(ON_THE_WAY)
        life = self._lives

        async def deliver() -> None:
            while True:
                due, data = await on_the_way.get()
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                if life != self._lives:
                    continue
                if not data:
                    break
                writer.write(data)
                await writer.drain()
            writer.close()

        delivering = asyncio.ensure_future(deliver())
        try:
            while True:
                data = await reader.read(CHUNK)
                await on_the_way.put((time.monotonic() + self.round_trip_s / 2, data))
                if not data:
                    break
            await delivering
        except ConnectionError:
            delivering.cancel()
            writer.close()
