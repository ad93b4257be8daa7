"""The pieces of an HTML page that is one file: no script, nothing asked of anybody, every string escaped.

Markup has a type of its own, and `tag` makes it; any other string is text, whatever is in it.
"""

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape

import numpy as np
from PIL import Image

GENERATOR = "vit-finetune report"  # by which a file is known as one of ours
VOID = {"img", "meta", "link", "wbr"}  # elements without an end
LOSSLESS = 128                     # pixels up to which a picture is stored exactly and shown pixel by pixel
LARGEST = 288                      # pixels of a picture's longer side

STYLE = """
:root { color-scheme: light; --ink: #1d2329; --soft: #5b6570; --line: #e2e6ea; }
* { box-sizing: border-box; }
body { margin: 0; background: #f5f6f8; color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto,
  "Noto Sans", "Liberation Sans", Arial, sans-serif; -webkit-text-size-adjust: 100%; overflow-wrap: anywhere; }
main { max-width: 1200px; margin: 0 auto; padding: 28px 16px 56px; }
h1 { font-size: 26px; line-height: 1.25; margin: 0; letter-spacing: -0.01em; }
h2 { font-size: 18px; margin: 36px 0 10px; }
h3 { font-size: 14px; margin: 0; font-weight: 600; }
p { margin: 6px 0; }
.soft, figcaption, .legend { color: var(--soft); font-size: 13px; }
.result { display: flex; flex-wrap: wrap; align-items: baseline; gap: 2px 12px; margin: 14px 0 18px; }
.result b { font-size: 40px; line-height: 1.1; letter-spacing: -0.02em; font-variant-numeric: tabular-nums; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); gap: 14px; }
.card { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 14px; min-width: 0; }
.wide { grid-column: 1 / -1; }
@media (min-width: 760px) { .broad { grid-column: span 2; } }
.head { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 12px; margin-bottom: 8px; }
.legend span { white-space: nowrap; margin-left: 10px; }
i { display: inline-block; width: 14px; height: 3px; border-radius: 2px; margin: 0 5px 3px 0; }
.left .head, .left .legend span { display: block; margin: 0; white-space: normal; }
svg { display: block; width: 100%; height: auto; }
svg text { font-family: inherit !important; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 150px), 1fr)); gap: 12px 18px;
  margin: 0; }
dt { color: var(--soft); font-size: 13px; } dd { margin: 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; }
th, td { text-align: left; padding: 4px 8px; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: break-word; }
th:first-child, td:first-child { padding-left: 4px; } th:last-child, td:last-child { padding-right: 4px; }
th { color: var(--soft); font-weight: 600; white-space: nowrap; }
.values td { padding-top: 2px; padding-bottom: 2px; }
.compared td, .compared th { white-space: normal; min-width: 92px; }
.compared td:first-child, .matrix tbody th { position: sticky; left: 0; background: #fff; }
.classes td:first-child, .settings td + td, .confusions td { min-width: 80px; overflow-wrap: anywhere; }
tr:last-child td { border-bottom: 0; }
.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.bar { background: linear-gradient(to right, #cfe5f3 var(--share), transparent 0) no-repeat 0 50% /
  calc(100% - 8px) calc(100% - 4px); min-width: 88px; }
tr.changed td { background: #fff6e6; } tr.changed td:first-child { box-shadow: inset 3px 0 #e69f00; font-weight: 600; }
.matrix { width: auto; border-collapse: separate; border-spacing: 1px; font-variant-numeric: tabular-nums; }
.matrix td, .matrix th { border: 0; padding: 2px 4px; text-align: center; vertical-align: middle; }
.matrix td { min-width: 27px; height: 25px; background: #f5f6f8; }
.matrix th { font-weight: 400; max-width: 130px; overflow: hidden; text-overflow: ellipsis; }
.matrix tbody th { text-align: right; }
.matrix thead th { vertical-align: bottom; }
.matrix thead span { display: inline-block; max-height: 110px; overflow: hidden; text-overflow: ellipsis; }
.upright span { writing-mode: vertical-rl; text-orientation: sideways; transform: rotate(180deg); }
.matrix td.dark { color: #fff; }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 215px), 1fr)); gap: 14px; }
figure { margin: 0; display: flex; flex-wrap: wrap; align-content: flex-start; gap: 8px 12px; }
figcaption { flex: 1 1 120px; }
figcaption div { color: var(--ink); font-size: 15px; } .pair { display: flex; gap: 6px; flex: 1 1 180px; }
.pair img { flex: 1 1 0; min-width: 0; width: 50%; align-self: start; height: auto;
  border-radius: 4px; background: #eef0f3; }
img.exact { image-rendering: pixelated; }
pre { margin: 6px 0 0; padding: 10px 12px; background: #f5f6f8; border-radius: 6px; white-space: pre-wrap;
  user-select: all; font: 12.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace; }
.notice { background: #fff6e6; border-color: #f0d9ac; margin: 16px 0; } .notice ul { margin: 0; padding-left: 18px; }
.again + .again { margin-top: 14px; } details.card { margin-top: 14px; }
details summary { cursor: pointer; font-weight: 600; font-size: 14px; } details[open] summary { margin-bottom: 8px; }
@media print { body { background: #fff; } .card { break-inside: avoid; } }
"""


class Html(str):
    """Markup, which is put into other markup as it is."""


def tag(name: str, /, *children, **attributes) -> Html:
    """tag("td", "a < b", class_="n") -> <td class="n">a &lt; b</td>; an attribute that is None is left out."""
    said = "".join(f' {key.rstrip("_").replace("_", "-")}="{_escaped(value)}"' for key, value in attributes.items()
                   if value is not None)
    return Html(f"<{name}{said}>" + "".join(map(_escaped, children)) + f"</{name}>" * (name not in VOID))


def _escaped(child) -> str:
    return child if isinstance(child, Html) else escape(str(child))


def breakable(name: str) -> Html:
    """A name whose line may break after each underscore."""
    return Html(_escaped(name).replace("_", f"_{tag('wbr')}"))


def card(title: str, *body, legend: Sequence[tuple[str, str]] = (), class_: str = "") -> Html:
    """A box with a heading. legend: (what, colour) of the lines in a chart."""
    marks = [tag("span", tag("i", style=f"background: {colour}"), what) for what, colour in legend]
    head = tag("div", tag("h3", title), tag("div", *marks, class_="legend") if marks else "", class_="head")
    return tag("div", head if title else "", *body, class_=f"card {class_}".strip())


def section(title: str, *body) -> Html:
    return tag("section", tag("h2", title), *body)


def grid(*cards) -> Html:
    return tag("div", *cards, class_="grid")


def note(*sentence) -> Html:
    return tag("p", *sentence, class_="soft")


class Bar(float):
    """A share from 0 to 1, which a table shows as a number over a bar."""


def table(heads: Sequence[str], rows: Iterable[Sequence], numbers: Iterable[int] = (), changed: Iterable[int] = (),
          class_: str | None = None) -> Html:
    """A table that scrolls inside its box. numbers: columns set to the right; changed: rows that stand out."""
    numbers, changed = set(numbers), set(changed)
    kinds = ["n" if i in numbers else None for i in range(len(heads))]
    head = tag("tr", *(tag("th", head, class_=kind) for head, kind in zip(heads, kinds)))
    body = [tag("tr", *map(_cell, row, kinds), class_="changed" if r in changed else None)
            for r, row in enumerate(rows)]
    return tag("div", tag("table", tag("thead", head), tag("tbody", *body), class_=class_), class_="scroll")


def _cell(value, kind: str | None) -> Html:
    if isinstance(value, Bar):
        return tag("td", percent(value), class_="n bar", style=f"--share: {100 * value:.2f}%")
    return tag("td", "–" if value is None else value, class_=kind)


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.2f} %"


def facts(pairs: dict[str, object]) -> Html:
    """What there is of names and values, side by side as far as there is room."""
    return tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in pairs.items() if value))


def command(words: str) -> Html:
    return tag("pre", words)


def notice(sentences: Sequence[str]) -> Html:
    """A box of what is missing; nothing where nothing is."""
    if not sentences:
        return Html()
    return tag("div", tag("ul", *(tag("li", sentence) for sentence in sentences)), class_="card notice")


def picture(pixels: np.ndarray, what: str) -> Html:
    """(H, W, 3) uint8 -> an image inside the page. Small ones are exact, large ones JPEGs of LARGEST pixels at most."""
    image, file = Image.fromarray(pixels), io.BytesIO()
    exact = max(image.size) <= LOSSLESS
    if exact:
        image.save(file, "PNG", optimize=True)
    else:
        image.thumbnail((LARGEST, LARGEST))
        image.save(file, "JPEG", quality=85)
    source = f"data:image/{'png' if exact else 'jpeg'};base64,{base64.b64encode(file.getvalue()).decode()}"
    return tag("img", src=source, alt=what, width=image.width, height=image.height, class_="exact" if exact else None)


def document(title: str, *body) -> bytes:
    """The whole page. The browser itself is told to ask nobody for anything."""
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    head = [tag("meta", charset="utf-8"), tag("meta", name="generator", content=GENERATOR),
            tag("meta", http_equiv="Content-Security-Policy", content=policy),
            tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
            tag("link", rel="icon", href="data:,"), tag("title", title), tag("style", Html(STYLE))]
    page = tag("html", tag("head", *head), tag("body", tag("main", *body)), lang="en")
    return f"<!DOCTYPE html>\n{page}\n".encode("utf-8", "replace")  # a file's name need not be text


def is_ours(path) -> bool:
    """Whether a file is a page made here, which may be made again."""
    with open(path, "rb") as file:
        return f'content="{GENERATOR}"'.encode() in file.read(500)
