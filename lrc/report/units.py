"""Numbers as people read them."""


def count(value: float) -> str:
    """Return 1234567 as `1.23 M`."""
    for limit, suffix in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{suffix}"
    return f"{value:g}"


def size(value: float) -> str:
    """Return a number of bytes as `12.3 MB`."""
    return count(value) + ("B" if abs(value) >= 1e3 else " B")


def share(part: float, whole: float) -> str:
    """Return part of whole as a percentage, or a dash."""
    return f"{part / whole:.1%}" if whole else "–"
