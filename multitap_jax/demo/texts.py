"""Guidance texts for a scene, with controlled faults, and the ratings people would give them.

A text states a claim for each thing it mentions, then gives advice: "Near left: red ball. Far right: two blue boxes.
Walk ahead." Faults change the claims: a wrong side, a wrong depth, a wrong attribute, a thing
left out, a thing made up. Advice is always drawn from what the *text* claims, so that nobody can tell a bad text by its
contradicting itself; it turns unsafe because the claims are wrong.

Every fault maps the distribution of true claims onto itself (sides are permuted, a depth flips, an attribute is drawn
anew, and a scene of three things loses one where a scene of two gains one). A text therefore looks the same whether
it is right or wrong, and only the picture tells. Filler sentences (conciseness) are the one exception, by nature.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from multitap_jax.demo.scenes import COLOURS, DEPTHS, MATERIALS, NUMBER_SHARES, SHAPES, SIDES, Scene, Thing, draw_thing

OBJECTIVES = (
    "direction_accuracy",
    "depth_accuracy",
    "safety",
    "sufficiency",
    "conciseness",
    "hallucination",
    "overall",
)
"""Rated from 1 (bad) to 5 (good) each; a hallucination rating of 5 means that nothing is made up."""

FAULTS = ("direction", "depth", "attribute", "number")
"""`number` leaves a thing out of a scene of three, or makes one up in a scene of two."""

REQUEST = "Which way is safe to walk?"
FILLER_SHARE = 0.15
ANNOTATORS = 3
ANNOTATOR_NOISE = 0.4
"""Standard deviation of one annotator around the rule, in points of the 1-5 scale, before rounding to whole points."""

_ADVICE = {"left": "Keep left.", "ahead": "Walk ahead.", "right": "Keep right.", "": "Stop and wait."}
_PLURALS = {"ball": "balls", "box": "boxes", "cone": "cones", "barrel": "barrels"}
_FILLERS = (
    "Well, what a nice street this is.",
    "Let me tell you what I see.",
    "I hope that you enjoy your walk.",
    "As you may know, there are things here.",
)


@dataclasses.dataclass(frozen=True)
class Guidance:
    """A text with what it claims: its things, its advice (a side, or "" for stop) and whether it has filler."""

    things: tuple[Thing, ...]
    advice: str
    filler: str

    @property
    def text(self) -> str:
        """The sentences, in order: filler, claims, advice."""
        sentences = [self.filler] if self.filler else []
        return " ".join([*sentences, *(claim(thing) for thing in self.things), _ADVICE[self.advice]])


def claim(thing: Thing) -> str:
    """One sentence that states all there is to a thing (a matte surface is not worth a word)."""
    finish = "" if thing.material == "matte" else thing.material + " "
    number, noun = ("two ", _PLURALS[thing.shape]) if thing.count == 2 else ("", thing.shape)
    return f"{thing.depth.capitalize()} {thing.side}: {number}{finish}{thing.colour} {noun}."


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """A right text on the scene, without filler."""
    return dataclasses.replace(write_text(scene, (), rng), filler="").text


def write_texts(scene: Scene, rng: np.random.Generator) -> list[Guidance]:
    """Six texts: one right, one of each kind of fault, and one with two or three faults; in random order."""
    plans: list[Sequence[str]] = [(), *((fault,) for fault in FAULTS)]
    plans.append([str(f) for f in rng.permutation(FAULTS)[: int(rng.integers(2, 4))]])
    return [write_text(scene, plans[i], rng) for i in rng.permutation(len(plans))]


def write_text(scene: Scene, faults: Sequence[str], rng: np.random.Generator) -> Guidance:
    """One text on the scene with the given faults."""
    things = [scene.things[i] for i in rng.permutation(len(scene.things))]
    for fault in faults:
        things = _EDITS[fault](things, rng)
    blocked = {thing.side for thing in things if thing.depth == "near"}
    free = [side for side in SIDES if side not in blocked]
    advice = str(rng.choice(free)) if free else ""
    filler = str(rng.choice(_FILLERS)) if rng.random() < FILLER_SHARE else ""
    return Guidance(tuple(things), advice, filler)


def _wrong_direction(things: list[Thing], rng: np.random.Generator) -> list[Thing]:
    """Moves the things to other sides, at least two of them (a lone thing is moved alone)."""
    old = [thing.side for thing in things]
    sides = old
    while sum(a != b for a, b in zip(old, sides, strict=True)) < min(2, len(old)):
        sides = [str(side) for side in rng.permutation(SIDES)[: len(things)]]
    return [dataclasses.replace(thing, side=side) for thing, side in zip(things, sides, strict=True)]


def _wrong_depth(things: list[Thing], rng: np.random.Generator) -> list[Thing]:
    """Flips the depth of two things, or of all."""
    flipped = set(rng.permutation(len(things))[: int(rng.integers(min(2, len(things)), len(things) + 1))].tolist())
    other = {DEPTHS[0]: DEPTHS[1], DEPTHS[1]: DEPTHS[0]}
    return [dataclasses.replace(t, depth=other[t.depth]) if i in flipped else t for i, t in enumerate(things)]


def _wrong_attribute(things: list[Thing], rng: np.random.Generator) -> list[Thing]:
    """Draws the looks of one or two things anew: another colour and shape, another material or count at times."""
    things = list(things)
    unused = [c for c in rng.permutation(tuple(COLOURS)).tolist() if c not in {t.colour for t in things}]
    for i in rng.permutation(len(things))[: min(int(rng.integers(1, 3)), len(unused))].tolist():
        new = draw_thing(rng, things[i].side, unused.pop())
        shape = str(rng.choice([s for s in SHAPES if s != things[i].shape]))
        things[i] = dataclasses.replace(new, shape=shape, depth=things[i].depth)
    return things


def _wrong_number(things: list[Thing], rng: np.random.Generator) -> list[Thing]:
    shrink = {1: 0.0, 2: NUMBER_SHARES[1] / NUMBER_SHARES[2], 3: 1.0}[len(things)]
    if rng.random() < shrink:
        dropped = int(rng.integers(len(things)))
        return [thing for i, thing in enumerate(things) if i != dropped]
    sides = [side for side in SIDES if side not in {thing.side for thing in things}]
    colours = [colour for colour in COLOURS if colour not in {thing.colour for thing in things}]
    made_up = draw_thing(rng, str(rng.choice(sides)), str(rng.choice(colours)))
    position = int(rng.integers(len(things) + 1))
    return [*things[:position], made_up, *things[position:]]


_EDITS = {
    "direction": _wrong_direction,
    "depth": _wrong_depth,
    "attribute": _wrong_attribute,
    "number": _wrong_number,
}


def rule_ratings(scene: Scene, guidance: Guidance) -> dict[str, float]:
    """The ratings without annotator noise, from 1.0 to 5.0, by comparing claims with the scene.

    A claim speaks of the thing of its colour, else of the thing on its side (in a wrong colour), else of nothing
    (made up). Overall multiplies what is right: a text that is wrong in one respect is not saved by the others.
    """
    by_colour = {thing.colour: thing for thing in scene.things}
    direction, depth, looks = [], [], []
    described = set()
    for said in guidance.things:
        real = by_colour.get(said.colour) or scene.on(said.side)
        if real is None:
            looks.append(0.0)
            continue
        described.add(real.side)
        direction.append(float(said.side == real.side))
        depth.append(float(said.depth == real.depth))
        same = (said.shape == real.shape, said.material == real.material, said.count == real.count)
        looks.append(0.4 * (said.colour == real.colour) + 0.3 * same[0] + 0.15 * same[1] + 0.15 * same[2])
    shares = {
        "direction_accuracy": _mean(direction),
        "depth_accuracy": _mean(depth),
        "safety": _safety(scene, guidance),
        "sufficiency": max(0.0, 1.0 - 2.0 * (1.0 - len(described) / len(scene.things))),
        "conciseness": 0.25 if guidance.filler else 1.0,
        "hallucination": max(0.0, 1.0 - 2.0 * (1.0 - _mean(looks))),
    }
    shares["overall"] = _overall(shares)
    return {name: 1.0 + 4.0 * shares[name] for name in OBJECTIVES}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _safety(scene: Scene, guidance: Guidance) -> float:
    """0 where the advice leads into something near, 0.5 where it stops for nothing, 1 where the way is free."""
    if not guidance.advice:
        return 1.0 if all((t := scene.on(side)) is not None and t.depth == "near" for side in SIDES) else 0.5
    ahead = scene.on(guidance.advice)
    return 0.0 if ahead is not None and ahead.depth == "near" else 1.0


_IMPORTANCE = {
    "direction_accuracy": 0.75,
    "depth_accuracy": 0.6,
    "hallucination": 0.55,
    "safety": 0.3,
    "sufficiency": 0.4,
    "conciseness": 0.1,
}
"""How much of the overall rating is lost when an objective is at its worst."""


def _overall(shares: dict[str, float]) -> float:
    product = 1.0
    for name, weight in _IMPORTANCE.items():
        product *= 1.0 - weight * (1.0 - shares[name])
    return product


def annotate(rule: dict[str, float], rng: np.random.Generator) -> dict[str, float]:
    """What a few people would say: the mean of whole-point ratings, each person off the rule by a little."""
    noisy = {}
    for name, value in rule.items():
        people = np.clip(np.rint(value + rng.normal(0.0, ANNOTATOR_NOISE, ANNOTATORS)), 1, 5)
        noisy[name] = round(float(people.mean()), 3)
    return noisy


def vocabulary_sample() -> list[str]:
    """Sentences with every word that texts can hold, for training a tokenizer; and answers, which become one token each
    as whoever asks questions expects."""
    things = [
        Thing(side, depth, colour, shape, material, count)
        for side in SIDES
        for depth in DEPTHS
        for colour in COLOURS
        for shape in SHAPES
        for material in MATERIALS
        for count in (1, 2)
    ]
    # Two claims in a row teach the merges of words that follow a space, as all but the first word of a text do.
    claims = [f"{claim(thing)} {claim(thing)}" for thing in things]
    advised = (f"{filler} {advice}" for filler in _FILLERS for advice in _ADVICE.values())
    return [*claims, *advised, REQUEST, *("Yes", "No", "yes", "no") * 1000]
