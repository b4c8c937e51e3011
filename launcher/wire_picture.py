"""A picture of who holds what, and of how much crossed the wire between them."""

from collections.abc import Sequence

from launcher.svg import WIDTH, picture, shortened, text

MOST_CLIENTS = 6
ROW, BOX_HEIGHT, CLIENT_WIDTH = 62, 48, 140
BROKER_X, BROKER_WIDTH = 208, 76
SERVER_X, SERVER_WIDTH, SERVER_HEIGHT = 352, WIDTH - 352 - 1, 84


def wire_picture(clients: Sequence[str], *, up: str, down: str) -> str:
    """Clients, broker and server; `up` and `down` say how much went to the server and back."""
    shown = list(clients[:MOST_CLIENTS])
    more = len(clients) - len(shown)
    height = max(SERVER_HEIGHT + 84, ROW * len(shown) + (22 if more else 0))
    middle = height / 2
    top = middle - (ROW * len(shown) + (22 if more else 0)) / 2 + (ROW - BOX_HEIGHT) / 2
    parts = [_wires(top, len(shown), middle)]
    for index, name in enumerate(shown):
        parts.append(_box(1, top + index * ROW, CLIENT_WIDTH, BOX_HEIGHT, "client", name, "data, head, tail"))
    if more:
        parts.append(text(CLIENT_WIDTH / 2, top + len(shown) * ROW + 8, f"and {more} more", "tick", "middle"))
    parts.append(_box(BROKER_X, middle - 24, BROKER_WIDTH, 48, "broker", "broker", "no keys"))
    parts.append(
        _box(SERVER_X, middle - SERVER_HEIGHT / 2, SERVER_WIDTH, SERVER_HEIGHT, "server", "server", "middle blocks")
    )
    centre = SERVER_X + SERVER_WIDTH / 2
    parts.append(text(centre, middle - SERVER_HEIGHT / 2 - 14, f"↑ {up}", "value", "middle"))
    parts.append(text(centre, middle + SERVER_HEIGHT / 2 + 26, f"↓ {down}", "value", "middle"))
    description = f"{len(clients)} clients reach the server through the broker: {up} up, {down} down, all sealed."
    return picture("What crossed the wire", description, height, parts)


def _wires(top: float, clients: int, middle: float) -> str:
    starts = (top + index * ROW + BOX_HEIGHT / 2 for index in range(clients))
    bend = (CLIENT_WIDTH + BROKER_X) / 2
    paths = [f"M{CLIENT_WIDTH + 1},{y:.1f} C{bend},{y:.1f} {bend},{middle:.1f} {BROKER_X},{middle:.1f}" for y in starts]
    paths.append(f"M{BROKER_X + BROKER_WIDTH},{middle:.1f} L{SERVER_X},{middle:.1f}")
    return f'<path class="wire" d="{" ".join(paths)}"/>'


def _box(x: float, y: float, width: float, height: float, kind: str, name: str, holds: str) -> str:
    centre, base_line = x + width / 2, y + height / 2
    return (
        f'<rect class="box {kind}" x="{x:.1f}" y="{y:.1f}" width="{width}" height="{height}" rx="9"/>'
        + text(centre, base_line - 3, shortened(name, int(width / 10)), "heading", "middle")
        + text(centre, base_line + 15, holds, "tick", "middle")
    )
