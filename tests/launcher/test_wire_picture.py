from xml.etree import ElementTree

import pytest

from launcher.wire_picture import MOST_CLIENTS, wire_picture


def words(names: list[str]) -> list[str]:
    root = ElementTree.fromstring(wire_picture(names, up="12 MB", down="7 MB"))
    return [element.text or "" for element in root.iter("text")]


def test_it_shows_who_takes_part_and_what_crossed() -> None:
    shown = words(["north", "valley"])
    assert {"north", "valley", "broker", "server", "↑ 12 MB", "↓ 7 MB"} <= set(shown)


@pytest.mark.parametrize("count", [0, 1, MOST_CLIENTS])
def test_a_few_clients_are_all_shown(count: int) -> None:
    shown = words([f"site-{index}" for index in range(count)])
    assert sum(word.startswith("site-") for word in shown) == count
    assert not any("more" in word for word in shown)


def test_of_many_clients_the_first_are_shown_and_the_rest_counted() -> None:
    shown = words([f"site-{index}" for index in range(MOST_CLIENTS + 3)])
    assert sum(word.startswith("site-") for word in shown) == MOST_CLIENTS
    assert "and 3 more" in shown


def test_names_are_escaped() -> None:
    assert "<b>" not in wire_picture(["<b>bold</b>"], up="<i>", down="<u>")
