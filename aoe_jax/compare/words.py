"""Numbers as the report writes them."""

import math


def number(value):
    """A count in few characters."""
    for unit, name in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * unit:  # what rounds to a thousand of one unit is 1 of the next
            return f"{value / unit:.3g}{name}"
    return f"{value:.3g}"


def plus_minus(found, digits=4):
    """A `Mean` with its standard error, where there is one."""
    if math.isnan(found.value):
        return "-"
    return f"{found.value:.{digits}f}" + (
        "" if math.isnan(found.error) else f" ± {found.error:.{digits}f}"
    )


def signed(found):
    """A `Difference` with standard error and interval."""
    if not found.n:
        return "-"
    text = f"{found.value:+.4f}"
    return (
        text if found.n < 2 else f"{text} ± {found.error:.4f} [{found.low:+.4f}, {found.high:+.4f}]"
    )
