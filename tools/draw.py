"""The figure of the README, all methods side by side: `python -m tools.draw` writes results/methods.svg.

Each method gets a panel: the pretrained weight, beside it its factors as boxes in the order in which the equation
multiplies them, below them the equation and how many parameters train. The equations and the shapes of the boxes are
written here; what trains and what is shared is read off a toy model with the method attached, sizes off its signature.
"""
import support

support.interruptible(__name__)  # before torch, which takes seconds to import

import re
from pathlib import Path
from typing import NamedTuple

import adapter
from methods import METHODS, arguments
from support.script import Parser, run_script

FILE = Path(__file__).parent.parent / "results" / "methods.svg"
WIDTH, PANEL, GAP, HEAD, EDGE = 880, (277, 198), 12, 48, 13  # the panels' size, space around them, above, inside
SIZES = {"square": (76, 76), "tall": (20, 76), "wide": (76, 20), "column": (13, 76), "core": (23, 23),
         "diagonal": (20, 20), "router": (20, 20)}
LETTERS = {"square": 20, "column": 12, "core": 11}  # heights of the letters, else 14
STYLE = """<style>
text { font-family: -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; font-size: 12px; fill: #1f2328 }
.name { font-size: 15px; font-weight: bold } .small { font-size: 11px; fill: #59636e } .sign { font-size: 18px }
.maths { font-size: 13px; font-style: italic } .word { font-style: normal } .low { font-size: 70% }
.count { font-weight: bold; fill: #a84300 } .card { fill: #ffffff; stroke: #d0d7de }
.ground { fill: #f3f4f6 } .hatch { stroke: #dcdfe4; stroke-width: 1.5 }
.frozen rect { fill: url(#hatching); stroke: #8c959f } .frozen text { fill: #57606a }
.trained rect { fill: #cc5500; stroke: #7a3300 } .trained text { fill: #ffffff; font-weight: bold }
.trained text.below { fill: #a84300 } .trained line { stroke: #ffffff; stroke-width: 2.5 }
rect.outline { fill: none; stroke: #1f2328; stroke-width: 1.3; stroke-dasharray: 4 2.5 }
.arrow { fill: none; stroke: #7a3300; stroke-width: 1.5 }
</style>
<pattern id="hatching" width="5" height="5" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">
<rect class="ground" width="5" height="5"/><path class="hatch" d="M0 0 v5"/></pattern>"""


class Box(NamedTuple):
    """A factor: its letter in the equation, the layer's tensors that it stands for, its shape, how many lie stacked."""
    letter: str
    tensors: str
    shape: str
    stack: int = 1


class Panel(NamedTuple):
    """A method: name, trainable parameters of the default model, boxes, what is said beside them, two lines below."""
    name: str
    parameters: int
    boxes: list
    note: str
    equation: str
    detail: str


def W(letter="W", stack=1):
    return Box(letter, "weight", "square", stack)


A, B, U, V = Box("A", "A", "wide"), Box("B", "B", "tall"), Box("U", "U", "tall"), Box("Vᵀ", "Vt", "wide")
PANELS = {
    "full": Panel("Full fine-tuning", 134_515_008, [W()], "W itself moves,\nand with it all the\nrest of the model",
                  "W ← W + dW", "no factors: the change is W_t − W_0"),
    "lora": Panel("LoRA", 4_884_480, [W(), B, A], "a change of rank r\nbeside W",
                  "h = W x + (alpha / r) B A x", "start: A uniform, B = 0"),
    "pissa": Panel("PiSSA", 4_884_480, [W("W_res"), B, A], "from the leading\nsingular triplets\nof W",
                   "h = W_res x + B A x", "W_res = W − B A at the start"),
    "sorsa": Panel("SORSA", 4_887_840, [W("W_r"), U, Box("S", "S", "diagonal"), V],
                   "singular triplets,\nU, V kept near\northonormal",
                   "h = W_r x + U diag(S) Vᵀ x", "W_r = W − U diag(S) Vᵀ at the start"),
    "sara": Panel("SARA", 374_785, [W("W_0"), B, Box("lam", "lam", "diagonal"), A], "k per layer, from\nW’s spectrum",
                  "h = W_0 x + B diag(lam) A x", "start: A, B random, lam = 0"),
    "mosara": Panel("Mo-SARA", 55_578, [W("W_0"), Box("v", "v", "column"), U, Box("Lam", "Lam", "diagonal", 5),
                                        Box("g", "W_g1 W_g2", "router"), V],
                    "router g mixes\nn sets Lam for\neach token",
                    "h = W_0 x + v * U (g Lam * z)", "z = Vᵀ x, g = softmax(z W_g1 W_g2)"),
    "cora": Panel("CoRA", 2_396_160, [W("W_i", 2), B, Box("A_i", "A", "wide", 2)],
                  "one B for k and v:\nsingular vectors of\nboth, side by side",
                  "h = W_i x + (alpha / r) B A_i x", "start: Bᵀ B = I, A_i = 0"),
    "cora-init": Panel("cora-init", 4_884_480, [W(), B, A], "starts as CoRA’s\nbasis; each layer\ntrains its own",
                       "h = W x + (alpha / r) B A x", "start: Bᵀ B = I, A = 0"),
    "lotr": Panel("LoTR", 1_253_376, [W("W_s", 3), B, Box("G_sᵀ", "G", "core", 3), Box("Aᵀ", "A", "wide")],
                  "B and A shared,\na core G_s for\neach layer",
                  "h = W_s x + (alpha / r) B G_sᵀ Aᵀ x", "start: A, B Gaussian, G_s = 0"),
}


# ---- what the code says of a method ---------------------------------------------------------------------------------

def traits(method):
    """{tensor: (does it train, do layers share it)} of a toy model with the method attached."""
    model, attach = adapter.Toy(), METHODS[method].attach
    attach(model, **({"rank": 4} if "rank" in arguments(attach) else {}))
    trained = adapter.trainable(model)
    return {name.rpartition(".")[2]: (name in trained, not name.startswith("layers")) for name in model.state_dict()}


def size(method):
    """The default size, and the targets where they are not all seven: "m = 0.05, on q and v"."""
    defaults = {name: argument.default for name, argument in arguments(METHODS[method].attach).items()}
    letters = {"rank": "r", "threshold": "m", "sets": "n"}
    said = [f"{letter} = {defaults[name]}" for name, letter in letters.items() if name in defaults]
    if (targets := defaults.get("targets") or adapter.TARGETS) != adapter.TARGETS:
        said.append("on " + " and ".join(target.removesuffix("_proj") for target in targets))
    return ", ".join(said) or "every parameter"


# ---- how it is drawn ------------------------------------------------------------------------------------------------

def rect(x, y, width, height, radius, kind="box"):
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="{radius}" class="{kind}"/>'


def text(x, y, formula, kind, place=""):
    """A line of text: what follows a _ is lowered, names of functions stand upright."""
    line = ""
    for i, part in enumerate(re.split("_([a-z0-9]+)", formula)):  # plain, lowered, plain, ...
        word = re.sub("diag|softmax", r'<tspan class="word">\g<0></tspan>', part.lstrip() if i else part)
        move = 'dy="3" class="low"' if i % 2 else 'dy="-3" dx="0.28em"' if part[:1] == " " else 'dy="-3"'
        line += f"<tspan {move}>{word}</tspan>" if i and part else word
    return f'<text x="{x}" y="{y}" class="{kind}" {place}>{line}</text>'


def draw_box(box, x, y, trains, shared):
    """A factor with its upper left corner at (x, y), those stacked behind it up and to the right."""
    width, height = SIZES[box.shape]
    parts = [rect(x + 3 * i, y - 3 * i, width, height, 1.5) for i in reversed(range(box.stack))]
    parts += [rect(x - 3.5, y - 3.5, width + 7, height + 7, 4, "outline")] * shared
    if box.shape == "diagonal":
        parts += [f'<line x1="{x + 3}" y1="{y + 3}" x2="{x + 17}" y2="{y + 17}"/>',
                  text(x + 10, y + 33, box.letter, "maths below", 'text-anchor="middle" style="font-size: 12px"')]
    elif box.letter:
        letter = LETTERS.get(box.shape, 14)
        parts.append(text(x + width / 2, y + height / 2 + round(0.35 * letter), box.letter, "maths",
                          f'text-anchor="middle" style="font-size: {letter}px"'))
    kind = ("trained" if trains else "frozen") + " shared" * shared
    return f'<g class="{kind}" data-tensors="{box.tensors}">{"".join(parts)}</g>'


def draw_boxes(boxes, found, x, y):
    """(SVG of W + the factors from left to right, x where the last one begins)."""
    parts, start = [], x
    for i, box in enumerate(boxes):
        trains, shared = found[box.tensors.split()[0]]
        if box.shape == "router":  # under the sets that it mixes
            parts += [draw_box(box, start, y + 54, trains, shared),
                      f'<path class="arrow" d="M{start + 10} {y + 52} v-11 m-3 4 l3 -4 l3 4"/>']
            continue
        if i == 1:
            parts.append(text(x + 4, y + 43, "+", "sign", 'text-anchor="middle"'))
            x += 15
        start = x + 3 * shared
        parts.append(draw_box(box, start, y, trains, shared))
        x = start + SIZES[box.shape][0] + 3 * (box.stack - 1) + 3 * shared + 5
    return "".join(parts), start


def draw_panel(method, x, y):
    """A method's card with its upper left corner at (x, y)."""
    panel, left, right = PANELS[method], x + EDGE, x + PANEL[0] - EDGE
    boxes, last = draw_boxes(panel.boxes, traits(method), left, y + 46)
    note_x, note_y = (last, y + 87) if len(panel.boxes) > 1 else (left + 96, y + 74)
    return "\n".join([
        f'<g id="{method}">', rect(x, y, *PANEL, 6, "card"), text(left, y + 25, panel.name, "name"),
        text(right, y + 25, size(method), "small", 'text-anchor="end"'), boxes,
        *(text(note_x, note_y + 14 * i, line, "small") for i, line in enumerate(panel.note.split("\n"))),
        text(left, y + 146, panel.equation, "maths"), text(left, y + 163, panel.detail, "small"),
        text(left, y + 185, f"{panel.parameters:,} parameters train", "count"), "</g>"])


def draw_legend(y):
    """What grey, colour, the dashed outline and a stack stand for."""
    parts = [text(WIDTH - GAP - EDGE, y + 2, "counts: the default model, 135M", "small", 'text-anchor="end"')]
    for x, trains, shared, stack, meaning in (
            (25, False, False, 1, "frozen"), (113, True, False, 1, "trained"),
            (209, False, True, 1, "shared by several layers"),
            (405, True, False, 3, "one per layer (Mo-SARA: n sets)")):
        parts.append(draw_box(Box("", "", "core", stack), x, y - 14, trains, shared))
        parts.append(text(x + 26 + 3 * stack + 4 * shared, y + 2, meaning, "legend"))
    return "\n".join(parts)


def draw():
    """The SVG's text."""
    height = HEAD + (len(PANELS) + 2) // 3 * (PANEL[1] + GAP)
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" width="{WIDTH}" height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}">', "<title>What each method freezes and what it trains</title>", STYLE,
        rect(0.5, 0.5, WIDTH - 1, height - 1, 10, "card"), draw_legend(30),
        *(draw_panel(method, GAP + i % 3 * (PANEL[0] + GAP), HEAD + i // 3 * (PANEL[1] + GAP))
          for i, method in enumerate(PANELS)), "</svg>\n"])


def main(argv=None):
    Parser(prog="python -m tools.draw", description=__doc__).parse_args(argv)
    FILE.write_text(draw(), encoding="utf-8")
    print(f"{FILE}: {len(PANELS)} methods")


if __name__ == "__main__":
    run_script(main)
