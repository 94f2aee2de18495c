"""Street scenes for the demo: what stands where, as plain values, drawn from a seeded generator.

A scene holds one to three groups of objects. Each group stands on its own side of the street (left, ahead or right),
near or far, and has one colour, one shape, one material and a count. Colours differ within a scene, so that a colour
names its group. Sides, depths and attributes are drawn uniformly and independently of each other: a sentence that is
true of one scene is false of another, which is what keeps the score out of the text alone (see `texts.py`).
"""

import dataclasses

import numpy as np

SIDES = ("left", "ahead", "right")
DEPTHS = ("near", "far")
SHAPES = ("ball", "box", "cone", "barrel")
MATERIALS = ("matte", "shiny", "striped")
COLOURS = {
    "red": (222, 38, 44),
    "blue": (36, 84, 226),
    "yellow": (248, 206, 22),
    "purple": (150, 40, 196),
}
NUMBER_SHARES = {1: 0.3, 2: 0.5, 3: 0.2}
"""How often a scene holds one, two or three things; `texts.py` relies on the outer two adding up to the middle."""
PAIR_SHARE = 0.2
"""Share of groups that are two objects of a kind side by side."""


@dataclasses.dataclass(frozen=True)
class Thing:
    """A group of `count` (1 or 2) equal objects; `side`, `depth`, ... are words of the tuples above."""

    side: str
    depth: str
    colour: str
    shape: str
    material: str
    count: int


@dataclasses.dataclass(frozen=True)
class Scene:
    """What a picture shows: 1 to 3 things, no two on the same side, no two of the same colour."""

    things: tuple[Thing, ...]

    def on(self, side: str) -> Thing | None:
        """The thing on one side, or None where the way is empty."""
        return next((thing for thing in self.things if thing.side == side), None)


def draw_thing(rng: np.random.Generator, side: str, colour: str) -> Thing:
    """A thing on a given side in a given colour, everything else drawn uniformly."""
    return Thing(
        side=side,
        depth=str(rng.choice(DEPTHS)),
        colour=colour,
        shape=str(rng.choice(SHAPES)),
        material=str(rng.choice(MATERIALS)),
        count=2 if rng.random() < PAIR_SHARE else 1,
    )


def draw_scene(rng: np.random.Generator) -> Scene:
    """One scene; the order of its things is random, so that no text betrays a side by its place."""
    number = int(rng.choice(list(NUMBER_SHARES), p=list(NUMBER_SHARES.values())))
    sides = rng.permutation(SIDES)[:number]
    colours = rng.permutation(tuple(COLOURS))[:number]
    return Scene(tuple(draw_thing(rng, str(s), str(c)) for s, c in zip(sides, colours, strict=True)))


def scene_rng(seed: int, index: int, stream: int) -> np.random.Generator:
    """A generator of its own for each (seed, scene, purpose): no scene depends on how many are drawn before it."""
    return np.random.default_rng([seed, index, stream])
