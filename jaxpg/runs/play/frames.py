"""Drawings: one frame of an episode, in a few lines and flat colours, for any environment."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIZE = 320, 240
CAPTION, LETTERS = 24, 14  # pixels, of the line below the drawing and of its letters
INK, PAPER, ACCENT, QUIET = "#1a1a1a", "#ffffff", "#c2491d", "#b8b8b8"
# Colours for the channels of an image, distinct in grey too.
CHANNELS = ("#1b4f72", "#c2491d", "#7fb3d5", "#d4ac0d", "#1e8449", "#884ea0", "#e59866", "#17202a")


def frame(environment: str, state: Any, obs: np.ndarray, caption: str) -> Image.Image:
    """Draws a state of a gymnax environment, or its observation if there is no drawer for it."""
    image = Image.new("RGB", (SIZE[0], SIZE[1] + CAPTION), PAPER)
    draw = ImageDraw.Draw(image)
    known = DRAWERS.get(environment)
    if known is not None:
        known(draw, state)
    elif obs.ndim >= 2:
        _pixels(draw, obs)
    else:
        _bars(draw, obs)
    draw.text((6, SIZE[1] + 3), caption, fill=INK, font=ImageFont.load_default(LETTERS))
    return image


def frames_per_second(environment: str) -> int:
    """A higher rate for worlds that move smoothly than for those that move by squares."""
    return 30 if environment in SMOOTH else 6


def _line(draw, points, width=3, fill=INK):
    draw.line([tuple(map(float, point)) for point in points], fill=fill, width=width)


def _disc(draw, centre, radius, fill=ACCENT):
    x, y = map(float, centre)
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)


def _cart_pole(draw, state):
    width, height = SIZE
    track, scale = height * 0.75, width / 4.8
    x, theta = width / 2 + scale * float(state.x), float(state.theta)
    tip = x + scale * math.sin(theta), track - scale * math.cos(theta)
    _line(draw, [(0, track), (width, track)], 1, QUIET)
    draw.rectangle((x - 22, track - 12, x + 22, track + 12), fill=INK)
    _line(draw, [(x, track), tip], 8, ACCENT)
    _disc(draw, (x, track), 5, QUIET)


def _pendulum(draw, state):
    width, height = SIZE
    pivot, theta = (width / 2, height / 2), float(state.theta)
    tip = pivot[0] - 90 * math.sin(theta), pivot[1] - 90 * math.cos(theta)
    _line(draw, [pivot, tip], 12, ACCENT)
    _disc(draw, pivot, 6, INK)
    # The torque, as an arc from the top.
    angle = 60 * float(np.ravel(state.last_u)[0])
    start, end = sorted((-90.0, -90.0 - angle))
    draw.arc(
        (pivot[0] - 40, pivot[1] - 40, pivot[0] + 40, pivot[1] + 40), start, end, fill=INK, width=3
    )


def _acrobot(draw, state):
    width, height = SIZE
    pivot, first = (width / 2, height / 2), float(state.joint_angle1)
    second = first + float(state.joint_angle2)
    middle = pivot[0] + 55 * math.sin(first), pivot[1] + 55 * math.cos(first)
    tip = middle[0] + 55 * math.sin(second), middle[1] + 55 * math.cos(second)
    goal = pivot[1] - 55  # one link above the pivot
    _line(draw, [(0, goal), (width, goal)], 1, QUIET)
    _line(draw, [pivot, middle], 8, INK)
    _line(draw, [middle, tip], 8, ACCENT)
    for joint in (pivot, middle):
        _disc(draw, joint, 6, QUIET)


def _mountain_car(draw, state):
    width, height = SIZE

    def at(position):
        share = (position + 1.2) / 1.8
        return share * width, height * (0.55 - 0.35 * math.sin(3 * position))

    _line(draw, [at(p) for p in np.linspace(-1.2, 0.6, 80)], 2)
    x, y = at(0.5)
    _line(draw, [(x, y), (x, y - 30)], 2)
    draw.polygon([(x, y - 30), (x + 14, y - 24), (x, y - 18)], fill=ACCENT)
    x, y = at(float(state.position))
    _disc(draw, (x, y - 8), 8)


def _pixels(draw, obs):
    """An image [H, W] or [H, W, C]: a colour for each channel, the last one that is set on top."""
    image = np.asarray(obs, float).reshape(*obs.shape[:2], -1)
    rows, columns, channels = image.shape
    side = min(SIZE[0] / columns, SIZE[1] / rows)
    left, top = (SIZE[0] - side * columns) / 2, (SIZE[1] - side * rows) / 2
    draw.rectangle((left, top, left + side * columns - 1, top + side * rows - 1), fill="#f0f0f0")
    for row, column, channel in np.argwhere(image > 0):
        x, y = left + side * column, top + side * row
        colour = CHANNELS[channel % len(CHANNELS)] if channels > 1 else INK
        draw.rectangle((x, y, x + side - 2, y + side - 2), fill=colour)


def _bars(draw, obs):
    """Draws each entry of the observation as a bar from the middle."""
    values = np.ravel(np.asarray(obs, float))
    wide = SIZE[0] / max(len(values), 1)
    middle = SIZE[1] / 2
    _line(draw, [(0, middle), (SIZE[0], middle)], 1, QUIET)
    for i, value in enumerate(values):
        end = middle - 0.45 * SIZE[1] * math.tanh(value)
        low, high = sorted((middle, end))
        draw.rectangle((i * wide + 3, low, (i + 1) * wide - 3, high), fill=ACCENT)


def _frozen_lake(draw, state):
    _cells(draw, np.zeros((4, 4)), divmod(int(state.position), 4), (3, 3))


def _maze(name) -> Callable:
    def drawer(draw, state):
        import gymnax

        walls = np.asarray(gymnax.make(name)[0].occupied_map)
        _cells(draw, walls, np.asarray(state.pos), np.asarray(state.goal))

    return drawer


def _cells(draw, walls, here, goal):
    rows, columns = walls.shape
    side = min(SIZE[0] / columns, SIZE[1] / rows)
    left, top = (SIZE[0] - side * columns) / 2, (SIZE[1] - side * rows) / 2
    for row in range(rows):
        for column in range(columns):
            x, y = left + side * column, top + side * row
            fill = INK if walls[row, column] else "#f0f0f0"
            draw.rectangle((x, y, x + side - 2, y + side - 2), fill=fill)
    for (row, column), colour in ((goal, QUIET), (here, ACCENT)):
        centre = left + side * (float(column) + 0.5), top + side * (float(row) + 0.5)
        _disc(draw, centre, 0.35 * side, colour)


DRAWERS: dict[str, Callable[[ImageDraw.ImageDraw, Any], None]] = {
    "CartPole-v1": _cart_pole,
    "Pendulum-v1": _pendulum,
    "Acrobot-v1": _acrobot,
    "MountainCar-v0": _mountain_car,
    "MountainCarContinuous-v0": _mountain_car,
    "FrozenLake-misc": _frozen_lake,
    "FourRooms-misc": _maze("FourRooms-misc"),
    "MetaMaze-misc": _maze("MetaMaze-misc"),
}
SMOOTH = ("CartPole-v1", "Pendulum-v1", "Acrobot-v1", "MountainCar-v0", "MountainCarContinuous-v0")
