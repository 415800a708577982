"""A self-contained HTML page of weighted trajectories: no script, style or font from elsewhere."""

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from vcore_train.colours import colour_of, legend_values

if TYPE_CHECKING:
    from vcore_train.show_weights import Token, WeightedTrajectory

LISTED = 8
_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
  color: #1b1f24; background: #fff; }
h1 { font-size: 1.35rem; margin: 0 0 .25rem; }
h2 { font-size: 1rem; margin: 2rem 0 .5rem; }
p { margin: .4rem 0; }
.note, .figures { color: #57606a; font-size: .9rem; }
.legend { display: inline-flex; border-radius: 4px; overflow: hidden; margin: .6rem 0; }
.legend span { padding: .15rem .7rem; font-size: .85rem; }
.tokens { font: 15px/1.9 ui-monospace, Menlo, Consolas, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; border: 1px solid #d0d7de; border-radius: 6px; padding: 1rem; }
.prompt { color: #8c959f; }
.t { position: relative; padding: .12rem 0; cursor: default; }
.t:hover { outline: 2px solid #1b1f24; z-index: 2; }
.t:hover::after { content: attr(data-tip); position: absolute; left: 0; top: 1.9em;
  white-space: pre; background: #1b1f24; color: #fff;
  font: 13px/1.5 ui-monospace, Menlo, Consolas, monospace;
  padding: .4rem .6rem; border-radius: 4px; z-index: 3; pointer-events: none; }
.lists { display: flex; gap: 3rem; flex-wrap: wrap; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding-bottom: .3rem; }
th, td { text-align: right; padding: .15rem .9rem .15rem 0; }
th:first-child, td:first-child { text-align: left; font-family: ui-monospace, Menlo, monospace; }
th { font-weight: 500; color: #57606a; border-bottom: 1px solid #d0d7de; }
"""


def weights_page(
    trajectories: Sequence["WeightedTrajectory"], *, title: str, note: str = ""
) -> str:
    """The page as a string. Hovering over a token shows its weight, utility and loss."""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
{f"<p>{escape(note)}</p>" if note else ""}
<p class="note">Each response token stands on the colour of its weight: 1 is uniform supervision,
red counts more, blue less. Hover over a token for its figures.</p>
{_legend()}
{"".join(_section(trajectory) for trajectory in trajectories)}
</body>
</html>
"""


def _legend() -> str:
    cells = []
    for value in legend_values():
        background, ink = colour_of(value)
        cells.append(f'<span style="background:{background};color:{ink}">{value:.2g}</span>')
    return f'<div class="legend">{"".join(cells)}</div>'


def _section(trajectory: "WeightedTrajectory") -> str:
    ranked = sorted(trajectory.supervised, key=lambda token: token.weight or 0.0)
    listed = min(LISTED, len(ranked) // 2)
    lists = ""
    if listed:
        lists = (
            f'<div class="lists">{_list("Heaviest", ranked[::-1][:listed])}'
            f"{_list('Lightest', ranked[:listed])}</div>"
        )
    return f"""
<h2>{escape(trajectory.where)}</h2>
<div class="tokens">{"".join(_token(token) for token in trajectory.tokens)}</div>
<p class="figures">{len(ranked)} response tokens &middot; KL from uniform {trajectory.kl:.4f} nats
&middot; tau {trajectory.tau:.4g} &middot; effective sample size {trajectory.ess:.3f}</p>
{lists}
"""


def _token(token: "Token") -> str:
    if token.weight is None:
        return f'<span class="prompt">{escape(token.text)}</span>'
    background, ink = colour_of(token.weight)
    tip = (
        f"{visible(token.text)}\nweight  {token.weight:.3f}\nutility {token.utility:+.3e}\n"
        f"nll     {token.nll:.3f} nats"
    )
    body = token.text.rstrip("\n")
    breaks = "\n" * (len(token.text) - len(body))
    return (
        f'<span class="t" style="background:{background};color:{ink}" data-tip="{_attribute(tip)}">'
        f"{escape(body) or '&#9166;'}</span>{breaks}"
    )


def _attribute(text: str) -> str:
    return escape(text).replace("\n", "&#10;")


def visible(text: str) -> str:
    """A token's text with its spaces and line breaks to be seen."""
    return text.replace(" ", "\u2423").replace("\n", "\u23ce").replace("\t", "\u21e5")


def _list(caption: str, tokens: Sequence["Token"]) -> str:
    rows = "".join(
        f"<tr><td>{escape(visible(token.text))}</td><td>{token.weight:.3f}</td>"
        f"<td>{token.utility:+.2e}</td><td>{token.nll:.3f}</td></tr>"
        for token in tokens
    )
    return (
        f"<table><caption>{caption}</caption><tr><th>token</th><th>weight</th><th>utility</th>"
        f"<th>nll</th></tr>{rows}</table>"
    )
