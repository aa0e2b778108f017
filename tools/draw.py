"""The figure of the README, all methods side by side: `python -m tools.draw` writes results/methods.svg.

Each method gets a panel: the pretrained weight, beside it its factors as boxes in the order in which the equation
multiplies them, below them the equation and how many parameters train. The equations and the shapes of the boxes are
written here; what trains and what is shared is read off a toy model with the method attached, sizes off its signature.
"""
import re
from pathlib import Path
from typing import NamedTuple

import adapter
from methods import METHODS, arguments
from support.script import Parser, run_script

FILE = Path(__file__).parent.parent / "results" / "methods.svg"
WIDTH, PANEL, GAP, HEAD, EDGE = 880, (277, 198), 12, 48, 13  # the panels' size, space around them, above, inside
SHAPES = {"square": (76, 76), "tall": (20, 76), "wide": (76, 20), "small": (23, 23), "diagonal": (20, 20),
          "column": (13, 76), "router": (20, 20)}
LETTERS = {"square": 20, "column": 12, "small": 11}  # sizes of the letters, else 14

STYLE = """
text { font-family: -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; font-size: 12px; fill: #1f2328 }
.card { fill: #ffffff; stroke: #d0d7de } .panel { fill: #ffffff; stroke: #d0d7de }
.name { font-size: 15px; font-weight: bold } .maths { font-style: italic } .maths .word { font-style: normal }
.equation { font-size: 13px } .small { font-size: 11px; fill: #59636e } .count { font-weight: bold; fill: #a84300 }
.ground { fill: #f3f4f6 } .hatch { stroke: #dcdfe4; stroke-width: 1.5 }
.frozen rect { fill: url(#hatching); stroke: #8c959f } .frozen text { fill: #57606a }
.trained rect { fill: #c44e00; stroke: #7a3300 } .trained text { fill: #ffffff; font-weight: bold }
.trained text.below { fill: #a84300 } .trained line { stroke: #ffffff; stroke-width: 2.5 }
rect.outline { fill: none !important; stroke: #1f2328 !important; stroke-width: 1.3; stroke-dasharray: 4 2.5 }
.arrow { fill: none; stroke: #7a3300; stroke-width: 1.5 }
"""


class Box(NamedTuple):
    """One factor: its letter in the equation, the tensors in the layer that it stands for, its shape, how many of it."""
    letter: str
    tensors: str
    shape: str
    stack: int = 1


class Panel(NamedTuple):
    """One method: name, factors from left to right, equation, what is to be said of it in small, a note of some lines."""
    name: str
    boxes: list
    equation: str
    detail: str
    note: list


def weight(letter="W", stack=1):
    return Box(letter, "weight", "square", stack)


B, A = Box("B", "B", "tall"), Box("A", "A", "wide")
PANELS = {
    "full": Panel("Full fine-tuning", [weight()], "W ← W + dW", "no factors: the change is W_t − W_0",
                  ["W itself moves,", "and with it all the", "rest of the model"]),
    "lora": Panel("LoRA", [weight(), B, A], "h = W x + (alpha / r) B A x", "start: A uniform, B = 0",
                  ["a change of rank r", "beside W"]),
    "pissa": Panel("PiSSA", [weight("W_res"), B, A], "h = W_res x + B A x", "W_res = W − B A at the start",
                   ["from the leading", "singular triplets", "of W"]),
    "sorsa": Panel("SORSA", [weight("W_r"), Box("U", "U", "tall"), Box("S", "S", "diagonal"), Box("Vᵀ", "Vt", "wide")],
                   "h = W_r x + U diag(S) Vᵀ x", "W_r = W − U diag(S) Vᵀ at the start",
                   ["the triplets; U, V", "kept near", "orthonormal"]),
    "sara": Panel("SARA", [weight("W_0"), B, Box("lam", "lam", "diagonal"), A], "y = W_0 x + B diag(lam) A x",
                  "start: A, B random, lam = 0", ["k per layer, from", "W’s spectrum"]),
    "mosara": Panel("Mo-SARA", [weight("W_0"), Box("v", "v", "column"), Box("U", "U", "tall"),
                                Box("Lam", "Lam", "diagonal", 5), Box("g", "W_g1 W_g2", "router"),
                                Box("Vᵀ", "Vt", "wide")],
                    "y = W_0 x + v * U (g Lam * h)", "h = Vᵀ x, g = softmax(h W_g1 W_g2)",
                    ["router g mixes", "n sets Lam for", "each token"]),
    "cora": Panel("CoRA", [weight("W_i", 2), B, Box("A_i", "A", "wide", 2)], "h = W_i x + (alpha / r) B A_i x",
                  "start: Bᵀ B = I, A_i = 0", ["one B for k and v,", "a basis of both,", "never moves"]),
    "cora-init": Panel("cora-init", [weight(), B, A], "h = W x + (alpha / r) B A x", "start: Bᵀ B = I, A = 0",
                       ["starts as CoRA’s", "basis; each layer", "trains its own"]),
    "lotr": Panel("LoTR", [weight("W_s", 3), B, Box("G_sᵀ", "G", "small", 3), Box("Aᵀ", "A", "wide")],
                  "h = W_s x + (alpha / r) B G_sᵀ Aᵀ x", "start: A, B Gaussian, G_s = 0",
                  ["B, A for all layers,", "a core G_s", "for each"]),
}
PARAMETERS = {"full": 134_515_008, "lora": 4_884_480, "pissa": 4_884_480, "sorsa": 4_887_840, "sara": 374_785,
              "mosara": 55_578, "cora": 2_396_160, "cora-init": 4_884_480, "lotr": 1_253_376}  # of the default model


# ---- what the code says of a method ---------------------------------------------------------------------------------

def traits(method):
    """{tensor: (does it train, do layers share it)} of a toy model with the method attached."""
    model, attach = adapter.Toy(), METHODS[method].attach
    attach(model, **({"rank": 4} if "rank" in arguments(attach) else {}))
    trained = adapter.trainable(model)
    return {name.rpartition(".")[2]: (name in trained, not name.startswith("layers")) for name in model.state_dict()}


def size(method):
    """The default size, and where it is not all seven, the targets: "m = 0.05, on q and v"."""
    defaults = {name: argument.default for name, argument in arguments(METHODS[method].attach).items()}
    said = [f"{letter} = {defaults[name]}" for name, letter in (("rank", "r"), ("threshold", "m"), ("sets", "n"))
            if name in defaults]
    targets = defaults.get("targets") or adapter.TARGETS
    if tuple(targets) != adapter.TARGETS:
        said.append("on " + " and ".join(target.removesuffix("_proj") for target in targets))
    return ", ".join(said)


# ---- how it is drawn ------------------------------------------------------------------------------------------------

def rect(x, y, width, height, extra=""):
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" {extra}/>'


def text(x, y, content, kind, extra=""):
    return f'<text x="{x}" y="{y}" class="{kind}" {extra}>{content}</text>'


def maths(formula):
    """SVG of a formula: what follows a _ is lowered, names of functions stand upright."""
    parts = []
    for i, part in enumerate(re.split("_([a-z0-9]+)", formula.replace(" ", "\u00a0"))):  # other spaces may get lost
        part = re.sub("diag|softmax", r'<tspan class="word">\g<0></tspan>', part)
        parts.append(f'<tspan dy="3" font-size="70%">{part}</tspan>' if i % 2 else
                     f'<tspan dy="-3">{part}</tspan>' if i and part else part)
    return "".join(parts)


def draw_box(box, x, y, trains, shared):
    """A factor with its upper left corner at (x, y), those stacked behind it up and to the right."""
    width, height = SHAPES[box.shape]
    parts = [rect(x + 3 * i, y - 3 * i, width, height, 'rx="1.5"') for i in reversed(range(box.stack))]
    if shared:
        parts.append(rect(x - 3.5, y - 3.5, width + 7, height + 7, 'rx="4" class="outline"'))
    if box.shape == "diagonal":
        parts.append(f'<line x1="{x + 3}" y1="{y + 3}" x2="{x + 17}" y2="{y + 17}"/>')
        parts.append(text(x + 10, y + 33, maths(box.letter), "maths below", 'text-anchor="middle"'))
    else:
        letter = LETTERS.get(box.shape, 14)
        place = f'text-anchor="middle" style="font-size: {letter}px"'
        parts.append(text(x + width / 2, y + height / 2 + round(0.35 * letter), maths(box.letter), "maths", place))
    kind = ("trained" if trains else "frozen") + " shared" * shared
    return f'<g class="{kind}" data-tensors="{box.tensors}">{"".join(parts)}</g>'


def draw_row(boxes, found, x, y):
    """(SVG of W + the factors from left to right, x where the last one begins)."""
    parts, start = [], x
    for i, box in enumerate(boxes):
        trains, shared = found[box.tensors.split()[0]]
        margin = 3 * shared
        if i == 1:
            parts.append(text(x + 4, y + 43, "+", "sign", 'text-anchor="middle" style="font-size: 18px"'))
            x += 15
        if box.shape == "router":  # under the sets that it mixes
            parts += [draw_box(box, start, y + 54, trains, shared),
                      f'<path class="arrow" d="M{start + 10} {y + 52} v-11 m-3 4 l3 -4 l3 4"/>']
            continue
        start = x + margin
        parts.append(draw_box(box, start, y, trains, shared))
        x = start + SHAPES[box.shape][0] + 3 * (box.stack - 1) + margin + 5
    return "".join(parts), start


def draw_panel(method, x, y):
    panel, left, right = PANELS[method], x + EDGE, x + PANEL[0] - EDGE
    row, last = draw_row(panel.boxes, traits(method), left, y + 46)
    note_x, note_y = (last, y + 87) if len(panel.boxes) > 1 else (left + 96, y + 74)
    parts = [rect(x, y, *PANEL, 'rx="6" class="panel"'), text(left, y + 25, panel.name, "name"),
             text(right, y + 25, size(method), "small", 'text-anchor="end"'), row]
    parts += [text(note_x, note_y + 14 * i, maths(line), "small") for i, line in enumerate(panel.note)]
    parts += [text(left, y + 146, maths(panel.equation), "maths equation"),
              text(left, y + 163, maths(panel.detail), "small"),
              text(left, y + 185, f"{PARAMETERS[method]:,} parameters train", "count")]
    return f'<g id="{method}">' + "\n".join(parts) + "</g>"


def draw_legend(x, y):
    """What grey, colour, the dashed outline and a stack stand for."""
    parts = []
    for kind, shared, stack, meaning, width in (
            ("frozen", False, 1, "frozen", 90), ("trained", False, 1, "trained", 92),
            ("frozen", True, 1, "shared by several layers", 198),
            ("trained", False, 3, "one per layer (Mo-SARA: n sets)", 0)):
        parts.append(draw_box(Box("", "", "small", stack), x, y - 14, kind == "trained", shared))
        parts.append(text(x + 26 + 3 * stack, y + 2, meaning, "legend"))
        x += width
    parts.append(text(WIDTH - GAP - EDGE, y + 2, "counts: the default model, 135M", "small", 'text-anchor="end"'))
    return "".join(parts)


def draw():
    """The SVG's text."""
    rows = -(-len(PANELS) // 3)
    height = HEAD + rows * (PANEL[1] + GAP)
    panels = [draw_panel(method, GAP + i % 3 * (PANEL[0] + GAP), HEAD + i // 3 * (PANEL[1] + GAP))
              for i, method in enumerate(PANELS)]
    hatching = ('<pattern id="hatching" width="5" height="5" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
                '<rect class="ground" width="5" height="5"/><path d="M0 0 v5" class="hatch"/></pattern>')
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" role="img">',
        "<title>What each method freezes and what it trains</title>",
        f"<style>{STYLE}</style>", f"<defs>{hatching}</defs>",
        rect(0.5, 0.5, WIDTH - 1, height - 1, 'rx="10" class="card"'), draw_legend(GAP + EDGE, 30), *panels, "</svg>\n"])


def main(argv=None):
    Parser(prog="python -m tools.draw", description=__doc__.split("\n")[0]).parse_args(argv)
    FILE.write_text(draw(), encoding="utf-8")
    print(f"wrote {FILE.relative_to(Path.cwd()) if FILE.is_relative_to(Path.cwd()) else FILE}")


if __name__ == "__main__":
    run_script(main)
