"""How `loratune data` draws in a terminal: tokens lit or dim, histograms of blocks, the ledger, notes."""

from collections.abc import Callable, Iterator, Mapping, Sequence

from rich.cells import cell_len, chop_cells
from rich.console import Console
from rich.table import Table
from rich.text import Text

from loratune.data.ledger import Ledger
from loratune.data.preview import Histogram, Piece, Preview, Shown, spans, visible

_BLOCKS = " ▁▂▃▄▅▆▇█"
_HEIGHT = 4  # lines of a histogram
_MAX_TOKENS = 800  # of one document; a page shows all
_MIN_WIDTH, _MAX_WIDTH = 80, 120  # narrower, histograms stand one below the other; wider, the eye loses the line
_MAX_REJECTS = 20
# (trained, special) -> the style, and the mark without colours, that neighbouring tokens take in turn. The colours are
# fixed ones, since in many themes green and bright green are one; the greys can be read on black and on white.
_STYLES = {
    (True, False): ("color(16) on color(114)", "color(16) on color(157)"),
    (True, True): ("bold color(16) on color(74)", "bold color(16) on color(117)"),
    (False, False): ("color(242)", "color(246)"),
    (False, True): ("cyan", "cyan"),
}
_MARKS = {(True, False): "^=", (True, True): "##", (False, False): "  ", (False, True): "--"}
_LEGEND = {
    (True, False): "trained",
    (True, True): "trained, special token",
    (False, False): "seen, not trained",
    (False, True): "special token",
}
_INSIDE = "∙"  # a token that ends inside a character

Cell = tuple[str, str, str]  # text, style, mark


def show_preview(console: Console, found: Preview) -> None:
    """Draws the whole preview: what the file is, what was rejected, rows, histograms, notes."""
    _show_facts(console, found)
    _show_rejects(console, found.ledger, 5)
    if any(row.documents for row in found.rows):
        _show_legend(console)
    for row in found.rows:
        _show_row(console, row)
    _show_histograms(console, found)
    _show_notes(console, found.ledger)


def show_ledger(console: Console, source: str, ledger: Ledger, word: str, written: Mapping[str, int]) -> None:
    """Draws a ledger: rows in = rows trained (or another `word`) + rows rejected, files written, reasons, notes."""
    table = _facts_table()
    table.add_row("file", visible(source))
    table.add_row("rows", _counts(ledger, word))
    for name, count in written.items():
        table.add_row("wrote", f"{visible(name)}, {_count(count, 'row')}")
    console.print(table)
    _show_rejects(console, ledger, _MAX_REJECTS)
    _show_notes(console, ledger)


def _show_rejects(console: Console, ledger: Ledger, limit: int) -> None:
    """Draws the first rejected rows with their reasons."""
    if not ledger.rejects:
        return
    _heading(console, f"rejected: {_count(len(ledger.rejects), 'row')}")
    for each in ledger.rejects[:limit]:
        _item(console, "✗", "red", each.where, each.reason)
    if (more := len(ledger.rejects) - limit) > 0:
        _say(console, f"  ... and {more:,} more; --json lists all", "dim")


def _show_notes(console: Console, ledger: Ledger) -> None:
    """Draws what is no error but worth a look: duplicates, unusual characters ..."""
    if not ledger.notes:
        return
    _heading(console, "worth a look")
    for name, note in ledger.notes.items():
        more = ["..."] if note.count > len(note.examples) else []
        _item(console, "·", "yellow", f"{name} ({note.count:,})", *note.examples, *more)


def _show_facts(console: Console, found: Preview) -> None:
    mapped = ", ".join(f"{column} from {key}" for column, key in found.columns.items())
    table = _facts_table()
    table.add_row("file", visible(found.source))
    table.add_row("format", visible(f"{found.format or 'none found'}{f' ({mapped})' if mapped else ''}"))
    limit = f"{found.max_tokens:,} tokens a row" if found.max_tokens else "none known (--max-tokens N)"
    template = f", {found.template}" if found.template else ""
    table.add_row("model", visible(f"{found.model}{template}"))
    table.add_row("limit", limit)
    table.add_row("rows", _counts(found.ledger))
    if found.num_tokens:
        share = f"{found.num_trained / found.num_tokens:.0%}"
        trained = (f"{found.num_trained:,} trained", "green")
        table.add_row("tokens", Text.assemble(f"{found.num_tokens:,}, ", trained, f" ({share}, {found.train_on})"))
    console.print(table)


def _facts_table() -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _counts(ledger: Ledger, word: str = "trained") -> Text:
    rejected = len(ledger.rejects)
    return Text.assemble(
        f"{ledger.rows_in:,} in = ",
        (f"{ledger.rows_trained:,} {word}", "green"),
        " + ",
        (f"{rejected:,} rejected", "red" if rejected else ""),
    )


# ---- tokens ---------------------------------------------------------------------------------------------------------


def _show_legend(console: Console) -> None:
    console.print()
    if _is_plain(console):
        _say(console, "below the text: ^ and = trained tokens by turns, # trained special, - special", "dim")
    else:
        parts = [part for kind, words in _LEGEND.items() for part in ((f" {words} ", _STYLES[kind][0]), " ")]
        console.print(Text.assemble(*parts))


def _show_row(console: Console, row: Shown) -> None:
    if row.reason is not None:
        console.print()
        _item(console, "✗", "red", row.where, row.reason)
    for number, pieces in enumerate(row.documents, 1):
        part = f", part {number} of {len(row.documents)}" if len(row.documents) > 1 else ""
        trained = sum(piece.trained for piece in pieces)
        _heading(console, f"{row.where}{part}", f"  {_count(len(pieces), 'token')}, {trained:,} trained")
        for line in _lines(pieces, min(console.width, _MAX_WIDTH)):
            console.print(Text.assemble(*((text, style) for text, style, _ in line), no_wrap=True, overflow="ignore"))
            if _is_plain(console) and (marks := "".join(mark * cell_len(text) for text, _, mark in line).rstrip()):
                console.print(Text(marks, no_wrap=True, overflow="ignore"))


def _lines(pieces: Sequence[Piece], width: int) -> Iterator[list[Cell]]:
    """Yields the lines that a document fills: one ends where its text does, and where the next token has no room."""
    half = _MAX_TOKENS // 2
    if len(pieces) <= _MAX_TOKENS:
        yield from _wrapped(pieces, width, 0)
        return
    middle = pieces[half:-half]
    hidden = (
        f"... {len(middle):,} tokens, {sum(piece.trained for piece in middle):,} of them trained (--html shows them)"
    )
    yield from _wrapped(pieces[:half], width, 0)
    yield [(hidden, "italic", " ")]
    yield from _wrapped(pieces[-half:], width, len(pieces) - half)


def _wrapped(pieces: Sequence[Piece], width: int, start: int) -> Iterator[list[Cell]]:
    for span in spans(pieces):
        line: list[Cell] = []
        used = 0
        for number, piece in enumerate(span, start):
            text, style, mark = _styled(piece, number)
            for part in chop_cells(text, width):
                if line and used + cell_len(part) > width:
                    yield line
                    line, used = [], 0
                line.append((part, style, mark))
                used += cell_len(part)
        start += len(span)
        yield line


def _styled(piece: Piece, number: int) -> Cell:
    kind = (piece.trained, piece.special)
    return visible(piece.text) or _INSIDE, _STYLES[kind][number % 2], _MARKS[kind][number % 2]


def _is_plain(console: Console) -> bool:
    return console.color_system is None or console.no_color


# ---- histograms -----------------------------------------------------------------------------------------------------


def _show_histograms(console: Console, found: Preview) -> None:
    if found.lengths is None or found.shares is None:
        return
    drawn = (
        _histogram("length in tokens", found.lengths, lambda value: f"{value:,.0f}", "cyan", 1),
        _histogram("trained share", found.shares, lambda value: f"{value:.0%}", "green", 2),
    )
    console.print()
    if console.width < _MIN_WIDTH:
        console.print(*drawn, sep="\n\n")
        return
    table = Table.grid(padding=(0, 6, 0, 0))
    table.add_row(*drawn)
    console.print(table)


def _histogram(name: str, values: Histogram, shown: Callable[[float], str], style: str, width: int) -> Text:
    columns = [level for count in values.counts for level in [count / max(values.counts)] * width]
    lines = ["".join(_block(level * _HEIGHT - row) for level in columns) for row in reversed(range(_HEIGHT))]
    low, high = shown(values.edges[0]), shown(values.edges[-1])
    return Text.assemble(
        (f"{name}\n", "bold"),
        *((f"{line}\n", style) for line in lines),
        (f"{low}{high.rjust(max(len(columns), 20) - len(low))}\n", "dim"),
        (f"median {shown(values.median)}, 95% up to {shown(values.most)}", "dim"),
        no_wrap=True,
    )


def _block(level: float) -> str:
    """One character of a column: an eighth at least where there is anything."""
    return _BLOCKS[0 if level <= 0 else max(1, min(8, round(level * 8)))]


# ---- lines ----------------------------------------------------------------------------------------------------------


def _heading(console: Console, text: str, note: str = "") -> None:
    console.print()
    console.print(Text.assemble((visible(text), "bold"), (note, "dim")))


def _item(console: Console, mark: str, style: str, name: str, *texts: str) -> None:
    """Prints a name with a text behind it, or with several below it."""
    table = Table.grid(padding=(0, 1))
    first, *rest = (Text(visible(text), "dim", overflow="fold") for text in texts)
    table.add_row(Text(f"  {mark}", style), Text.assemble(f"{visible(name)}: ", first, overflow="fold"))
    for text in rest:
        table.add_row("", text)
    console.print(table)


def _say(console: Console, text: str, style: str = "") -> None:
    console.print(Text(text, style=style))


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
