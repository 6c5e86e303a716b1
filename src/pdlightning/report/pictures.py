"""The figures of a run as small pictures inside the page, each with what it shows in words."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import NamedTuple

from pdlightning.report.curves import metric_classes
from pdlightning.report.read import RunFiles

BUDGET = 1_500_000
"""Bytes of all pictures together; the rest stay in the folder, and the page says which."""

TEXTS = {
    "MeanCIFigure": "Mean ci of each subcomponent in falling order, one panel per site. A cliff from those that matter "
    "to the rest is healthy; a long slope is not finished.",
    "FiringDensityFigure": "How many subcomponents fire how often: a histogram of the share of positions, on a log "
    "axis. The grey bar at the left are those that never fire.",
    "HistogramFigure": "Histogram over all positions and subcomponents, counts on a log scale. Two heaps far apart "
    "mean that the ci function has decided.",
    "L0ByPositionFigure": "How many subcomponents fire at each position of a sequence.",
    "SingleFeatureCIFigure": "ci of every subcomponent (columns) for an input of one feature alone (rows). A solved "
    "identity is one dark diagonal with nothing beside it.",
    "ComponentWeightsFigure": "V (top) and U transposed (below) of every site, subcomponents in matched order.",
    "VectorsFigure": "Columns of the target's weight beside those of the subcomponents, as arrows. Where it is solved "
    "each arrow of the target has one of a subcomponent upon it.",
    "NeuronContributionsFigure": "What each neuron contributes to each feature, in the target and by the "
    "subcomponents of mlp_in: the two should agree.",
    "PGDLadder": "Reconstruction error under a longer and longer attack.",
}


SMALL = 150_000
"""Bytes up to which a file is taken as it is: fewer colours would blur thin lines for little."""


class Picture(NamedTuple):
    name: str
    text: str
    source: str
    width: int
    height: int


def pictures(run: RunFiles) -> list[Picture]:
    """As data URIs, within the budget; a file that is no picture becomes a note of the run."""
    found, spent = [], 0
    for path in run.pictures:
        try:
            content, size = small_png(path)
        except (OSError, ValueError) as error:
            run.notes.append(f"figures/{path.name} is no picture and was left out ({error}).")
            continue
        spent += len(content)
        if spent > BUDGET:
            run.notes.append(f"figures/{path.name} would make this page too big: it is only in the folder.")
            spent -= len(content)
            continue
        source = f"data:image/png;base64,{base64.b64encode(content).decode()}"
        found.append(Picture(path.stem.replace("_", " "), text_of(path.stem, run), source, *size))
    return found


def small_png(path: Path) -> tuple[bytes, tuple[int, int]]:
    """The picture, a large one with a palette of 256 colours; and its width and height."""
    from PIL import Image

    original = path.read_bytes()
    with Image.open(io.BytesIO(original)) as image:
        image.load()  # a truncated file is found here
        if len(original) <= SMALL:
            return original, image.size
        reduced = io.BytesIO()
        flat = Image.new("RGB", image.size, "white")
        flat.paste(image, mask=image.getchannel("A") if "A" in image.getbands() else None)
        flat.quantize(256, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(reduced, "PNG")
    return min(original, reduced.getvalue(), key=len), flat.size


def text_of(stem: str, run: RunFiles) -> str:
    """By the class of the evaluation that drew it: a file is named after its evaluation."""
    owners = {n: c for n, c in metric_classes(run.config).items() if stem == n or stem.startswith(f"{n}_")}
    name = max(owners, key=len, default="")
    return TEXTS.get(owners.get(name, ""), f"Figure {stem} of this run.")
