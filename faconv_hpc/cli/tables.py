"""Tables for a terminal, of which nothing is cut away however narrow it is."""

from collections.abc import Collection

from rich.box import SIMPLE
from rich.table import Table


def table_of(*columns: str, text: Collection[str] = (), title: str | None = None, caption: str | None = None) -> Table:
    """An empty table: numbers stand on one line, below the words of their heading one upon the other; the columns of
    ``text`` are folded where there is no room for them."""
    table = Table(title=title, caption=caption, box=SIMPLE, collapse_padding=True, pad_edge=False)
    for column in columns:
        if column in text:
            table.add_column(column, overflow="fold")
        else:
            table.add_column(column.replace(" ", "\n"), justify="right", no_wrap=True)
    return table
