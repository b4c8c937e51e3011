"""A worker's connection against what is at the other end while a broker ends and another begins."""

import threading

import zmq

from shared import PROTOCOL_VERSION
from shared.wire.connection import BrokerConnection, hello
from shared.wire.curve import Door
from shared.wire.envelope import Hello, Welcome, pack, parse

WAIT_S = 20.0


def test_a_greeting_that_was_lost_is_sent_again() -> None:
    """A broker that is just ending takes the connection and the greeting, and answers nothing."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as door:
        port = door.bind_to_random_port("tcp://127.0.0.1")
        heard = []

        def answer_the_second() -> None:
            for _ in range(2):
                assert door.poll(int(WAIT_S * 1000))
                peer, *frames = door.recv_multipart()
                heard.append(parse(frames).header)
            welcome = Welcome(version=PROTOCOL_VERSION, heartbeat_s=1.0, timeout_s=5.0)
            door.send_multipart([peer, *pack(welcome).frames()])

        broker = threading.Thread(target=answer_the_second)
        broker.start()
        with BrokerConnection(context, Door(f"tcp://127.0.0.1:{port}"), hello("client")) as connection:
            connection.open(WAIT_S)
            assert connection.up
        broker.join()
        assert [type(header) for header in heard] == [Hello, Hello]
