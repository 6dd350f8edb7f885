"""Tables as aligned text, for printed results of core and of the command line."""

from collections.abc import Sequence

Table = Sequence[Sequence[str]]  # the header first


def as_text(table: Table) -> str:
    """Return the table with aligned columns, the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]
    return "\n".join(lines)
