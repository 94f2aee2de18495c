"""Draws a scene as a small street picture: shaded sprites on a floor in perspective.

Objects are shaded per pixel (a Lambert term, a highlight, a horizon mirrored in shiny ones), once per kind and size at
four times the resolution, then pasted; a picture takes about 3 ms. The street differs from left to right (brick wall,
road, hedge), which lets even a tiny vision tower know where in the picture it looks.
"""

import functools
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from multitap_jax.demo.scenes import COLOURS, Scene, Thing, draw_scene, scene_rng

SIZE = 168
"""Width and height of a picture in pixels: a multiple of 28, the edge of a merged vision cell."""

_OVERSAMPLE = 4
_HORIZON = 0.34
_LIGHT = np.array([-0.5, -0.65, 0.57], np.float32)
_CENTRE = {"near": {"left": 0.2, "ahead": 0.5, "right": 0.8}, "far": {"left": 0.25, "ahead": 0.5, "right": 0.75}}
_GROUND = {"near": 0.93, "far": 0.52}
_HEIGHT = {"near": 0.31, "far": 0.165}
_WIDTH_RATIO = {"ball": 1.0, "box": 1.0, "cone": 0.86, "barrel": 0.76}
_SIZE_STEPS = (0.94, 1.0, 1.06)


def render_scene(scene: Scene, rng: np.random.Generator, size: int = SIZE) -> Image.Image:
    """The picture of a scene, RGB, size x size; `rng` jitters daylight, places and sizes a little."""
    picture = _street(size, int(rng.integers(_NUM_STREETS))).copy()
    for thing in sorted(scene.things, key=lambda thing: thing.depth == "near"):
        _paste_thing(picture, thing, rng, size)
    return picture


def render_world(folder: str | Path, num_scenes: int, seed: int) -> list[tuple[Scene, str]]:
    """Draws `num_scenes` scenes into `folder`/images as PNG.

    Returns:
      Each scene with the path of its picture relative to `folder`, in order. The same arguments give the same bytes.
    """
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    drawn = []
    for index in range(num_scenes):
        scene = draw_scene(scene_rng(seed, index, 0))
        name = f"images/{index:05d}.png"
        render_scene(scene, scene_rng(seed, index, 1)).save(folder / name, compress_level=3)
        drawn.append((scene, name))
    return drawn


def _paste_thing(picture: Image.Image, thing: Thing, rng: np.random.Generator, size: int) -> None:
    scale = float(rng.choice(_SIZE_STEPS)) * (0.76 if thing.count == 2 else 1.0)
    sprite = _sprite(thing.shape, thing.colour, thing.material, round(_HEIGHT[thing.depth] * scale * size))
    centre = (_CENTRE[thing.depth][thing.side] + rng.uniform(-0.025, 0.025)) * size
    ground = (_GROUND[thing.depth] + rng.uniform(-0.02, 0.02)) * size
    offsets = [(0.0, 0.0)] if thing.count == 1 else [(-0.42, -0.06), (0.42, 0.04)]
    for across, down in offsets:
        x, y = centre + across * sprite.width, ground + down * sprite.height
        shadow = _shadow(sprite.width)
        picture.paste((14, 16, 26), (round(x - 0.42 * shadow.width), round(y - 0.6 * shadow.height)), shadow)
        picture.paste(sprite, (round(x - sprite.width / 2), round(y - sprite.height)), sprite)


@functools.lru_cache(maxsize=64)
def _shadow(width: int) -> Image.Image:
    """A soft ellipse (mask) for an object of the given width."""
    mask = Image.new("L", (round(width * 1.5), max(3, round(width * 0.5))), 0)
    inset = mask.height // 5
    ImageDraw.Draw(mask).ellipse((inset, inset, mask.width - inset - 1, mask.height - inset - 1), fill=150)
    return mask.filter(ImageFilter.GaussianBlur(max(1.0, width / 22)))


@functools.lru_cache(maxsize=1024)
def _sprite(shape: str, colour: str, material: str, height: int) -> Image.Image:
    """One shaded object on a transparent ground, RGBA, `height` pixels high."""
    width = round(height * _WIDTH_RATIO[shape])
    rows, cols = height * _OVERSAMPLE, width * _OVERSAMPLE
    y, x = np.meshgrid(np.linspace(-1, 1, rows), np.linspace(-1, 1, cols), indexing="ij")
    normal, inside = _SURFACES[shape](x.astype(np.float32), y.astype(np.float32))
    base = np.broadcast_to(np.array(COLOURS[colour], np.float32), (*x.shape, 3))
    if material == "striped":
        band = np.floor((y + 1.0) * 2.5 + 0.5).astype(int) % 2 == 1
        base = np.where(band[..., None], np.float32(246), base)
    rgb = _shade(base, normal, shiny=material == "shiny")
    rgba = np.concatenate([rgb * inside[..., None], 255.0 * inside[..., None]], -1)
    # Averaging premultiplied colours keeps the rim free of dark or light fringes.
    rgba = rgba.reshape(height, _OVERSAMPLE, width, _OVERSAMPLE, 4).mean((1, 3))
    rgba[..., :3] /= np.maximum(rgba[..., 3:], 1.0) / 255.0
    return Image.fromarray(np.clip(rgba, 0, 255).astype(np.uint8), "RGBA")


def _shade(base: np.ndarray, normal: np.ndarray, *, shiny: bool) -> np.ndarray:
    light = _LIGHT / np.linalg.norm(_LIGHT)
    diffuse = np.clip(normal @ light, 0, 1)[..., None]
    rgb = base * (0.46 + 0.62 * diffuse)
    if shiny:
        halfway = light + np.array([0, 0, 1], np.float32)
        highlight = np.clip(normal @ (halfway / np.linalg.norm(halfway)), 0, 1)[..., None] ** 42
        sky = np.clip(-1.8 * normal[..., 1:2] - 0.15, 0, 1)
        ground = np.clip(2.2 * normal[..., 1:2] - 0.5, 0, 1)
        rgb = rgb * (1 - 0.45 * ground) + 60 * sky + 240 * highlight
    return np.clip(rgb, 0, 255)


Surface = tuple[np.ndarray, np.ndarray]


def _ball(x: np.ndarray, y: np.ndarray) -> Surface:
    radius2 = x * x + y * y
    normal = np.stack([x, y, np.sqrt(np.clip(1 - radius2, 0, 1))], -1)
    return normal, (radius2 <= 1).astype(np.float32)


def _round_wall(x: np.ndarray, half_width: np.ndarray, tilt: float) -> np.ndarray:
    """Normals of an upright round wall seen from the front; `tilt` > 0 leans them towards the sky."""
    u = np.clip(x / np.maximum(half_width, 1e-3), -1, 1)
    facing = np.sqrt(1 - u * u)
    lean = np.full_like(u, -tilt)
    return np.stack([u, lean, facing], -1) / np.sqrt(1 + tilt * tilt)


def _cone(x: np.ndarray, y: np.ndarray) -> Surface:
    bottom = 1 - 0.2 * (1 - np.sqrt(np.clip(1 - x * x, 0, 1)))
    half_width = 0.05 + 0.95 * (y + 1) / 1.8
    inside = (np.abs(x) <= np.minimum(half_width, 1)) & (y <= bottom)
    return _round_wall(x, half_width, 0.4), inside.astype(np.float32)


def _barrel(x: np.ndarray, y: np.ndarray) -> Surface:
    rim = 0.17 * np.sqrt(np.clip(1 - x * x, 0, 1))
    top = np.abs(y + 0.83) <= rim
    inside = (y >= -0.83 - rim) & (y <= 0.83 + rim)
    normal = _round_wall(x, np.ones_like(x), 0.0)
    return np.where(top[..., None], np.array([-0.1, -0.9, 0.42], np.float32), normal), inside.astype(np.float32)


def _box(x: np.ndarray, y: np.ndarray) -> Surface:
    edge = 0.42  # how far the top and the right side recede
    front = (x <= 1 - edge) & (y >= -1 + edge)
    slide = (x - (1 - edge)) / edge
    top = (y < -1 + edge) & (x + (y + 1 - edge) >= -1) & (x + (y + 1 - edge) <= 1 - edge)
    right = (slide > 0) & (y + slide * edge >= -1 + edge) & (y + slide * edge <= 1)
    normal = np.where(front[..., None], np.array([-0.15, -0.1, 0.98], np.float32), np.float32(0))
    normal = np.where(right[..., None], np.array([0.92, 0.2, 0.3], np.float32), normal)
    normal = np.where((top & ~right)[..., None], np.array([-0.2, -0.9, 0.38], np.float32), normal)
    return normal, (front | top | right).astype(np.float32)


_SURFACES = {"ball": _ball, "box": _box, "cone": _cone, "barrel": _barrel}
_NUM_STREETS = 6


@functools.lru_cache(maxsize=16)
def _street(size: int, variant: int) -> Image.Image:
    """An empty street under one of a few kinds of daylight."""
    warmth = np.float32(np.random.default_rng(variant).uniform(0, 1))
    big = size * _OVERSAMPLE
    y = np.linspace(0, 1, big, dtype=np.float32)[:, None, None]
    high = np.array([150, 190, 232], np.float32) + warmth * np.array([34, 2, -22], np.float32)
    low = np.array([226, 234, 240], np.float32) + warmth * np.array([16, -4, -26], np.float32)
    sky = high + (low - high) * np.clip(y / _HORIZON, 0, 1)
    road = np.array([104, 106, 114], np.float32) + 30 * (y - _HORIZON)
    pixels = np.where(y < _HORIZON, sky, road) * np.ones((1, big, 1), np.float32)
    picture = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8), "RGB")
    draw = ImageDraw.Draw(picture)
    _draw_edge(draw, big, 0.0, wall=(182, 134, 112), pavement=(216, 196, 160))
    _draw_edge(draw, big, 1.0, wall=(112, 142, 110), pavement=(142, 184, 112))
    for start in (0.0, 0.34, 0.58, 0.74, 0.85):
        end = start + 0.17 * (1 - start)
        left, right = ((0.49, 1.0), (0.51, 1.0))
        quad = [_recede(left, start), _recede(right, start), _recede(right, end), _recede(left, end)]
        draw.polygon([(x * big, y_ * big) for x, y_ in quad], fill=(238, 236, 226))
    return picture.resize((size, size), Image.Resampling.BOX)


def _recede(point: tuple[float, float], share: float) -> tuple[float, float]:
    """Moves a point of the frame towards the vanishing point; all in parts of the picture's edge."""
    x, y = point
    return x + (0.5 - x) * share, y + (_HORIZON - y) * share


def _draw_edge(
    draw: ImageDraw.ImageDraw, big: int, edge: float, *, wall: tuple[int, int, int], pavement: tuple[int, int, int]
) -> None:
    """The wall and the pavement along the left (`edge` 0) or right (1) side of the road."""
    foot, far, inner = (edge, 0.62), 0.86, (0.24 if edge == 0 else 0.76, 1.0)

    def scaled(*points: tuple[float, float]) -> list[tuple[float, float]]:
        return [(x * big, y * big) for x, y in points]

    draw.polygon(scaled(foot, _recede(foot, far), _recede(inner, far), inner, (edge, 1.0)), fill=pavement)
    draw.line(scaled(inner, _recede(inner, far)), fill=(240, 238, 230), width=max(1, big // 90))
    draw.polygon(scaled((edge, 0.0), _recede((edge, 0.0), far), _recede(foot, far), foot), fill=wall)
    seam = (round(wall[0] * 0.86), round(wall[1] * 0.86), round(wall[2] * 0.86))
    for share in (np.linspace(0.08, 0.78, 6) ** 0.8).tolist():
        draw.line(scaled(_recede((edge, 0.0), share), _recede(foot, share)), fill=seam, width=max(1, big // 150))
