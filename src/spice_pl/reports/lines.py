"""Draw lines over a number as an SVG file."""

from collections.abc import Mapping, Sequence

WIDTH, HEIGHT, MARGIN = 480, 320, 48  # pixels
COLOURS = ("#1f5fbf", "#c2511b", "#3c8a3c")
Points = Sequence[tuple[float, float]]


def line_figure(curves: Mapping[str, Points], x_name: str, y_name: str) -> str:
    """Return an SVG of lines and axes; text and axes take the colour of the page around it."""
    everything = [each for points in curves.values() for each in points]
    (left, right), (low, high) = ((min(part), max(part)) for part in zip(*everything, strict=True))
    right, high = right + (right == left), high + (high == low)

    def point(x: float, y: float) -> str:
        across = MARGIN + (x - left) / (right - left) * (WIDTH - 2 * MARGIN)
        up = HEIGHT - MARGIN - (y - low) / (high - low) * (HEIGHT - 2 * MARGIN)
        return f"{across:.1f},{up:.1f}"

    def words(x: float, y: float, text: str, more: str = "") -> str:
        return f'<text x="{x}" y="{y}" fill="currentColor" {more}>{text}</text>'

    bottom, end = HEIGHT - MARGIN, WIDTH - MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'font-family="sans-serif" font-size="12"><title>{y_name} over {x_name}</title>',
        f'<path d="M{MARGIN},{MARGIN}V{bottom}H{end}" fill="none" stroke="currentColor"/>',
        words(WIDTH / 2, HEIGHT - 10, x_name, 'text-anchor="middle"'),
        words(MARGIN, 20, y_name),
        words(MARGIN, bottom + 16, f"{left:.3g}"),
        words(end, bottom + 16, f"{right:.3g}", 'text-anchor="end"'),
        words(MARGIN - 4, bottom, f"{low:.3g}", 'text-anchor="end"'),
        words(MARGIN - 4, MARGIN + 4, f"{high:.3g}", 'text-anchor="end"'),
    ]
    key = ""  # above the plot, where it covers no line
    for number, (name, points) in enumerate(curves.items()):
        colour = COLOURS[number % len(COLOURS)]
        line = " ".join(point(x, y) for x, y in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        key += f'<tspan fill="{colour}" dx="{12 * bool(number)}">{name}</tspan>'
    parts.append(f'<text x="{end}" y="{MARGIN - 12}" text-anchor="end">{key}</text>')
    return "\n".join([*parts, "</svg>\n"])
