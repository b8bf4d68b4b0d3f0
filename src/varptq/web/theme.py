"""The look of the studio: the colours of the report (evaluate/report/page.css) on the system's
fonts. No font, icon or script is loaded from elsewhere."""

from __future__ import annotations

from importlib.resources import files

from gradio.themes import Base, Color

FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")
RUST = Color(
    *("#fdf5f1", "#fae8df", "#f4cfbe", "#ecb095", "#e08a64", "#cf6a3e"),
    *("#b84f25", "#9a401d", "#7d361b", "#652f1a", "#35170b"),
    name="rust",
)
PAPER = Color(
    *("#fdfdfc", "#f5f5f2", "#e4e5e3", "#cfd1cf", "#979da6", "#7a8089"),
    *("#646a73", "#464b52", "#2f3338", "#1f2226", "#17191c"),
    name="paper",
)


def theme() -> Base:
    """Light and dark, following the reader's system."""
    return Base(
        primary_hue=RUST,
        secondary_hue=RUST,
        neutral_hue=PAPER,
        radius_size="sm",
        font=FONTS,
        font_mono=MONO,
    ).set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_text_color="white",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover_dark="*primary_500",
        slider_color="*primary_600",
        slider_color_dark="*primary_500",
    )


def style() -> str:
    return files("varptq.web").joinpath("studio.css").read_text(encoding="utf-8")
