"""The parts of a page, as strings of HTML. Whatever comes from outside is escaped here."""

import base64
import dataclasses
import html
import io
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path

from multitap_jax.data.decode import ImageError, decode_image

SIDE = 336  # pixels: a picture of a card is shown at half of it


@dataclasses.dataclass(frozen=True)
class Interval:
    """An estimate with its interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if self.value != self.value:
            return "undefined"
        return f"{self.value:.3f}" + ("" if self.low != self.low else f" [{self.low:.3f}, {self.high:.3f}]")


@dataclasses.dataclass(frozen=True)
class Example:
    """A picture (path of a file on disk) with some of its texts: (text, human score, predicted score), in [0, 1]."""

    image: Path
    texts: Sequence[tuple[str, float, float]]


def write_page(path: str | Path, title: str, body: Iterable[str]) -> Path:
    """Writes one file that needs no other; folders are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    style = resources.files("multitap_jax.pages").joinpath("style.css").read_text(encoding="utf-8")
    page = _PAGE.format(title=escaped(title), style=style, body="\n".join(body))
    path.write_text(page, encoding="utf-8")
    return path


def escaped(value: object) -> str:
    """Text as it may stand in HTML, in attributes too."""
    return html.escape(str(value), quote=True)


def header(kicker: str, title: str, lead: str) -> str:
    """The head of a page."""
    parts = (escaped(part) for part in (kicker, title, lead))
    return "<header><p class=kicker>{}</p><h1>{}</h1><p class=lead>{}</p></header>".format(*parts)


def table(head: Iterable[str], rows: Iterable[Iterable[str]], *, style: str = "table") -> str:
    """A table of finished (escaped) cells; the first column names the row; `style` is a list of CSS classes."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    lines = []
    for row in rows:
        first, *rest = row
        lines.append(f"<tr><th scope=row>{first}</th>" + "".join(f"<td>{cell}</td>" for cell in rest) + "</tr>")
    return f"<div class='{style}'><table><thead><tr>{top}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"


def estimate(interval: Interval) -> str:
    """A cell with a number and its interval."""
    if interval.value != interval.value:
        return "<small>undefined</small>"
    if interval.low != interval.low:
        return f"<b>{interval.value:.3f}</b>"
    return f"<b>{interval.value:.3f}</b> <small>{interval.low:.3f} to {interval.high:.3f}</small>"


def spelled(name: str) -> str:
    """An objective's name as words."""
    return name[:1].upper() + name[1:].replace("_", " ")


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Names and values."""
    return "<dl>" + "".join(f"<dt>{escaped(name)}</dt><dd>{escaped(value)}</dd>" for name, value in pairs) + "</dl>"


def paragraphs(texts: Iterable[str]) -> str:
    """A paragraph each."""
    return "".join(f"<p>{escaped(text)}</p>" for text in texts)


def folded(heading: str, lines: Iterable[str]) -> str:
    """A list that opens on request."""
    items = "".join(f"<li>{escaped(line)}</li>" for line in lines)
    return f"<details><summary>{escaped(heading)}</summary><ul>{items}</ul></details>"


def gallery(
    heading: str, examples: Sequence[Example], *, words: str = "", alt: str = "The picture that the texts are about"
) -> str:
    """Cards of pictures with their texts, best rated first; `words` say how they were chosen."""
    cards = "".join(_card(example, alt) for example in examples)
    return f"<h2>{escaped(heading)}</h2>{paragraphs([words] if words else [])}<section class=gallery>{cards}</section>"


def _card(example: Example, alt: str) -> str:
    lines = []
    for text, human, predicted in sorted(example.texts, key=lambda row: -row[1]):
        lines.append(f"<li><p>{escaped(text)}</p>{_score('human', human)}{_score('model', predicted)}</li>")
    return f"<article>{_picture(example.image, alt)}<ul>{''.join(lines)}</ul></article>"


def _picture(path: Path, alt: str) -> str:
    """Decoded and written anew, so that nothing but pixels of the file gets into the page."""
    try:
        image = decode_image(path)
    except ImageError as error:
        return f"<p class=note>{escaped(str(error).replace(str(path), path.name))}</p>"  # pages travel, folders do not
    image.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    few = image.getcolors(4096) is not None  # drawn, not photographed
    image.save(buffer, "PNG") if few else image.save(buffer, "JPEG", quality=85)
    return f'<img src="{_data(buffer.getvalue(), "png" if few else "jpeg")}" alt="{escaped(alt)}">'


def _data(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _score(who: str, value: float) -> str:
    """A labelled bar for a score in [0, 1]."""
    width = 100 * min(max(value, 0.0), 1.0)
    bar = f"<span class=track><span class={who} style='width:{width:.0f}%'></span></span>"
    return f"<span class=score><i>{who}</i>{bar}<b>{value:.2f}</b></span>"


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body><main>
{body}
</main></body>
</html>
"""
