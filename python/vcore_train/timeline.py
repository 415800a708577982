"""One training step as a picture: phases on top, the operators that they call below."""

from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgb
from matplotlib.patches import Patch

from vcore_kernels.spans import PREFIX
from vcore_train.experiments.report import figure
from vcore_train.phase_table import OTHER, PHASES, Profile, Span, short

_HUES = (
    *("#c98a1b", "#c8452f", "#7a4fa3", "#3b6fb6", "#5b8f8a", "#2a9d6f"),
    *("#8a8f98", "#c98a1b", "#7a4fa3", "#c8452f", "#5b8f8a", "#9c6b4a"),
)
COLOURS = {**dict(zip(PHASES, _HUES, strict=True)), OTHER: "#b5b9c0"}
LEVELS = 5  # of nested spans below the phases
LANES = 2  # other threads, the busiest ones
WIDTH, UNIT = 14.0, 0.34  # inches: of the picture, of one level
# Levels: the phases, the outermost operators (their names stand upright), what these call.
PHASE_HEIGHT, TOP_HEIGHT, HEIGHT = 1.3, 2.4, 0.9
CHARACTERS = 260  # that fit side by side
NARROWEST = 0.0009  # share of the step below which a bar has no edge and is not drawn narrower


class Bar(NamedTuple):
    x: float  # share of the step
    width: float
    y: float
    height: float
    colour: str
    text: str


def plot_timeline(path: Path, profile: Profile) -> None:
    """The step of median length, one bar a span; operators have a paler shade of their phase."""
    order = sorted(profile.steps, key=lambda s: s.end - s.start)
    step = order[len(order) // 2]
    pieces = [p for p in profile.pieces if step.start <= p.start < step.end]
    inside = [s for s in profile.spans if step.start <= s.start < step.end and s is not step]
    kernels = [found for found in profile.device if step.start <= found[0] < step.end]

    def bar(start: float, end: float, y: float, height: float, colour: str, text: str) -> Bar:
        length = step.end - step.start
        width = max((min(end, step.end) - start) / length, NARROWEST)
        return Bar((start - step.start) / length, width, y, height, colour, text)

    def of_span(span: Span, y: float, height: float) -> Bar:
        phase = next((p.phase for p in pieces if p.start <= span.start < p.end), OTHER)
        return bar(span.start, span.end, y, height, _tint(phase, span), _label(span))

    bars = [bar(p.start, p.end, 0, PHASE_HEIGHT, COLOURS[p.phase], p.phase) for p in pieces]
    ticks, below = [(PHASE_HEIGHT / 2, "phase")], PHASE_HEIGHT + 0.15
    levels = _levels([s for s in inside if s.thread == step.thread and not s.phase])
    for number, spans in enumerate(levels[:LEVELS]):
        height = HEIGHT if number else TOP_HEIGHT
        bars += [of_span(span, below, height) for span in spans]
        text = ("operators", "they call")[number] if number < 2 else ""
        ticks.append((below + height / 2, text))
        below += height + 0.1
    for number, lane in enumerate(_other_threads(inside, step), 1):
        bars += [of_span(span, below, HEIGHT) for span in lane]
        ticks.append((below + HEIGHT / 2, f"thread {number}"))
        below += HEIGHT + 0.1
    if kernels:
        bars += [
            bar(start, end, below, HEIGHT, COLOURS[phase], "") for start, end, phase in kernels
        ]
        ticks.append((below + HEIGHT / 2, "device"))
        below += HEIGHT + 0.1

    milliseconds = (step.end - step.start) / 1e3
    with figure(path, size=(WIDTH, 1.4 + UNIT * below)) as (drawn, axes):
        _draw(axes, bars, milliseconds)
        axes.set_xlim(0, milliseconds)
        axes.set_ylim(below, -0.1)
        axes.set_yticks([y for y, _ in ticks], [text for _, text in ticks])
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("ms")
        axes.set_title(f"One step, {milliseconds:.0f} ms (the median of {len(order)})")
        seen = [name for name in COLOURS if any(piece.phase == name for piece in pieces)]
        drawn.legend(
            handles=[Patch(color=COLOURS[name], label=name) for name in seen],
            loc="outside lower center",
            ncols=min(len(seen), 8),
        )


def _draw(axes: Axes, bars: list[Bar], milliseconds: float) -> None:
    corners = []
    for x, width, y, height, _, _ in bars:
        left, right = x * milliseconds, (x + width) * milliseconds
        corners.append([(left, y), (right, y), (right, y + height), (left, y + height)])
    axes.add_collection(
        PolyCollection(
            corners,
            facecolors=[bar.colour for bar in bars],
            edgecolors="white",
            linewidths=[0.5 if bar.width > 2 * NARROWEST else 0.0 for bar in bars],
        )
    )
    for bar in bars:
        phase = bar.y == 0
        room = int(bar.width * CHARACTERS * (0.65 if phase else 1))
        upright = len(bar.text) > room and bar.height == TOP_HEIGHT
        if upright:
            room = 15 if bar.width > 0.0075 else 0
        if not bar.text or room < min(len(bar.text), 5):
            continue
        axes.text(
            (bar.x + bar.width / 2) * milliseconds,
            bar.y + bar.height / 2,
            bar.text if len(bar.text) <= room else f"{bar.text[: room - 1]}…",
            ha="center",
            va="center",
            rotation=90 if upright else 0,
            fontsize=10 if phase else 6,
            color="white" if sum(to_rgb(bar.colour)) < 1.75 else "#222222",
            clip_on=True,
        )


def _levels(spans: list[Span]) -> list[list[Span]]:
    """Spans of one thread by how many of the others they are nested in."""
    levels: list[list[Span]] = []
    around: list[Span] = []
    for span in spans:
        while around and around[-1].end <= span.start:
            around.pop()
        if len(around) == len(levels):
            levels.append([])
        levels[len(around)].append(span)
        around.append(span)
    return levels


def _label(span: Span) -> str:
    return short(span.name).removeprefix(PREFIX).removeprefix("torch::autograd::").lstrip("_")


def _tint(phase: str, span: Span) -> str:
    """The phase's colour: strong for the library's own spans and kernels, pale for others."""
    ours = span.name.startswith((PREFIX, "vcore_kernels::"))
    share = 0.8 if ours else 0.32
    mixed = (share * c + (1 - share) for c in to_rgb(COLOURS[phase]))
    return "#" + "".join(f"{round(255 * c):02x}" for c in mixed)


def _other_threads(spans: list[Span], step: Span) -> list[list[Span]]:
    """Outermost spans of the busiest other threads."""
    threads: dict[object, list[Span]] = {}
    for span in spans:
        if span.thread != step.thread and span.depth == 0:
            threads.setdefault(span.thread, []).append(span)
    busiest = sorted(threads.values(), key=lambda t: -sum(s.end - s.start for s in t))
    return busiest[:LANES]
