"""The colours of a report, light and dark, once: the style sheet and the check of their contrast read them here."""

from __future__ import annotations

PALETTE = {
    "paper": ("#ffffff", "#15171b"),
    "card": ("#f6f7f9", "#1d2025"),
    "ink": ("#1c2026", "#e7e9ec"),
    "quiet": ("#59616c", "#a3abb6"),
    "line": ("#dde1e6", "#333840"),
    "accent": ("#1f5fa8", "#86b7f0"),
    "good": ("#1a6e3c", "#74cf96"),
    "bad": ("#ad2a24", "#ff938a"),
    "wait": ("#855300", "#ecb45c"),
    "good-paper": ("#e2f4e8", "#173324"),
    "bad-paper": ("#fce9e7", "#42201e"),
    "wait-paper": ("#fdf1dc", "#3b2c10"),
    "hot": ("#ffb066", "#9a4f08"),
    "series-0": ("#1f6fb4", "#6fb1ee"),
    "series-1": ("#c2500a", "#f29a5c"),
    "series-2": ("#1c7f54", "#5fcb9b"),
    "series-3": ("#a8327f", "#ec8fc9"),
    "series-4": ("#6a51b8", "#b3a1f5"),
    "series-5": ("#8a6a00", "#dbbd4a"),
    "series-6": ("#0f7d8c", "#56c8d6"),
    "series-7": ("#b52f3c", "#f58d96"),
    "series-8": ("#5d6b1f", "#b2c35f"),
    "series-9": ("#6b5b52", "#c2b0a5"),
    "first": ("#2a3b8f", "#8f9cf2"),
    "last": ("#b3590a", "#f3b05c"),
}
"""name -> (light, dark)"""

TEXT = ("ink", "quiet", "accent", "good", "bad", "wait")
"""Colours of words; each is read on paper and on card."""

ON = {"good": "good-paper", "bad": "bad-paper", "wait": "wait-paper", "ink": "hot"}
"""Words on a ground of their own."""


def style_of_palette() -> str:
    """CSS: the scheme of the system, unless the switch of the page has chosen one."""
    light, dark = ("".join(f"--{name}:{pair[i]};" for name, pair in PALETTE.items()) for i in (0, 1))
    return (
        f":root{{color-scheme:light;{light}}}\n"
        f"@media (prefers-color-scheme:dark){{:root:not([data-theme=light]){{color-scheme:dark;{dark}}}}}\n"
        f":root[data-theme=dark]{{color-scheme:dark;{dark}}}\n"
    )
