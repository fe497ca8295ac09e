"""Numbers as a person reads them, the same way everywhere."""

import math


def figure(value: float) -> str:
    """Four significant digits: 0.2910, 1.2e-05, 5,953."""
    if value != 0 and math.isfinite(value) and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.4g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.4g}".rstrip(".")


def decimals(value: float, places: int) -> str:
    """Without the sign of a zero: -0.0004 to three places is 0.000."""
    text = f"{value:.{places}f}"
    return text.removeprefix("-") if float(text) == 0 else text


def places_for(difference: float) -> int:
    """Decimal places that show a difference of this size by two digits; 2 to 5."""
    if not (math.isfinite(difference) and difference):
        return 3
    return min(max(1 - math.floor(math.log10(abs(difference))), 2), 5)


def duration(seconds: float) -> str:
    """45 s, 12:05 min, 3:25:45 h."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02}:{rest:02} h"
    return f"{minutes}:{rest:02} min" if minutes else f"{rest} s"
