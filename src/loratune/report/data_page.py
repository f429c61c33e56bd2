"""A preview of data as one page of its own: no script, no file from elsewhere, light or dark as the screen is."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from html import escape
from itertools import pairwise

from loratune.data.ledger import Ledger, Note
from loratune.data.preview import Histogram, Piece, Preview, Shown, spans, visible

_MAX_REJECTS = 200  # the ledger lists all
_INSIDE = "∙"  # a token that ends inside a character
# The page may load nothing and run nothing: a mistake in escaping would stay without harm.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_STYLE = """
:root {
  color-scheme: light dark; --paper: #f6f6f3; --card: #fff; --ink: #16181a; --soft: #5d6063; --rule: #e2e2dc;
  --lit: #bfe9c8; --lit2: #dcf5e0; --lit-ink: #0d3519; --mark: #b5dbf5; --mark2: #d3eafa; --mark-ink: #0b3552;
  --green: #2f9e4f; --green-ink: #1f7a3a; --blue: #2a78d6; --red: #c6392f; --special: #1c6ba8;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #141515; --card: #1d1f1f; --ink: #eceeec; --soft: #9da19f; --rule: #303333;
    --lit: #1d5a31; --lit2: #28703f; --lit-ink: #e4fae9; --mark: #1b4f78; --mark2: #256292; --mark-ink: #e6f4ff;
    --green: #4cbb6c; --green-ink: #4cbb6c; --blue: #5b9fe8; --red: #ee6f64; --special: #72b7ec;
  }
}
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif }
main { max-width: 60rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .35rem; overflow-wrap: anywhere }
h2 { font-size: 1rem; margin: 2.25rem 0 .6rem }
p { margin: 0 }
.soft { color: var(--soft); overflow-wrap: anywhere }
.green { color: var(--green-ink) } .red { color: var(--red) }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(19rem, 100%), 1fr)); gap: 1rem }
.cards { margin-top: 1rem }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 1rem 1.15rem }
.big { font-size: 1.9rem; font-weight: 650; line-height: 1.2; font-variant-numeric: tabular-nums }
.bar { display: flex; gap: 2px; height: .5rem; margin: .7rem 0 .5rem; border-radius: 4px; overflow: hidden }
.bar { background: var(--rule) } .bar i { min-width: 3px }
.bar .green { background: var(--green) } .bar .red { background: var(--red) }
.bars { display: flex; align-items: flex-end; gap: 2px; height: 6rem; margin-top: .7rem }
.bars { border-bottom: 1px solid var(--rule) } .bars i { flex: 1; border-radius: 2px 2px 0 0 }
.lengths i { background: var(--blue) } .shares i { background: var(--green) }
.axis { display: flex; justify-content: space-between; font-size: .8rem; color: var(--soft) }
ul { list-style: none; margin: 0 } ul.card { padding: .4rem 1.15rem }
li { padding: .5rem 0; border-top: 1px solid var(--rule); overflow-wrap: anywhere } li:first-child { border: 0 }
code, .tokens { font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: .86rem }
.legend { display: flex; flex-wrap: wrap; gap: .4rem 1rem; margin-bottom: .8rem; font-size: .88rem; color: var(--soft) }
.legend mark { padding: .1em .4em }
.row { margin-bottom: 1rem } .row b { overflow-wrap: anywhere }
.row header { display: flex; flex-wrap: wrap; gap: 0 1rem; justify-content: space-between; margin-bottom: .6rem }
.row h3 { font-size: .88rem; color: var(--soft); margin: 1rem 0 .4rem }
.tokens { line-height: 1.75; color: var(--soft); white-space: pre-wrap; overflow-wrap: anywhere }
.tokens span, mark { border-radius: 3px; padding: .1em 0 }
.tokens span, mark { -webkit-box-decoration-break: clone; box-decoration-break: clone }
.tokens span:hover, .tokens mark:hover { outline: 1.5px solid currentcolor }
.tokens span:nth-child(even):not(.s) { background: color-mix(in srgb, var(--soft) 11%, transparent) }
mark { background: var(--lit); color: var(--lit-ink) } mark:nth-child(even) { background: var(--lit2) }
mark.s { background: var(--mark); color: var(--mark-ink) } mark.s:nth-child(even) { background: var(--mark2) }
span.s { color: var(--special) }
"""


def data_page(found: Preview) -> str:
    """Returns a preview as HTML, whole in itself; every text in it shows as text (see `preview.visible`)."""
    name = _text(found.source)
    body = [
        f"<h1>{name}</h1>",
        f'<p class="soft">{" · ".join(map(_text, _facts(found)))}</p>',
        f'<div class="cards">{_rows_card(found.ledger)}{_tokens_card(found)}{"".join(_histograms(found))}</div>',
        *_rejects(found.ledger),
        *_notes(found.ledger),
        *_rows(found.rows),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{name} · loratune data</title><style>{_STYLE}</style></head>\n<body><main>\n"
        + "\n".join(body)
        + "\n</main></body></html>\n"
    )


def _facts(found: Preview) -> Iterator[str]:
    mapped = ", ".join(f"{column} from {key}" for column, key in found.columns.items())
    yield f"{found.format or 'no format found'}{f' ({mapped})' if mapped else ''}"
    yield f"for {found.model}{f', {found.template}' if found.template else ''}"
    yield f"trains on {found.train_on}"
    yield f"at most {found.max_tokens:,} tokens a row" if found.max_tokens else "no limit known"


# ---- numbers --------------------------------------------------------------------------------------------------------


def _rows_card(ledger: Ledger) -> str:
    rejected = len(ledger.rejects)
    kinds = [("green", ledger.rows_trained, "trained"), ("red", rejected, "rejected")]
    return _card(f"{ledger.rows_in:,}", "rows in", kinds)


def _tokens_card(found: Preview) -> str:
    share = f" ({found.num_trained / found.num_tokens:.0%})" if found.num_tokens else ""
    kinds = [
        ("green", found.num_trained, f"trained{share}"),
        ("", found.num_tokens - found.num_trained, "seen, not trained"),
    ]
    return _card(f"{found.num_tokens:,}", f"tokens in {_count(found.num_documents, 'document')}", kinds)


def _card(number: str, what: str, kinds: Sequence[tuple[str, int, str]]) -> str:
    bars = "".join(f'<i class="{name}" style="flex: {count}"></i>' for name, count, _ in kinds if count)
    words = " + ".join(f'<span class="{name if count else ""}">{count:,} {word}</span>' for name, count, word in kinds)
    return (
        f'<div class="card"><p><span class="big">{number}</span> <span class="soft">{what}</span></p>'
        f'<div class="bar">{bars}</div><p class="soft">= {words}</p></div>'
    )


def _histograms(found: Preview) -> Iterator[str]:
    if found.lengths is not None and found.shares is not None:
        yield _histogram("Length in tokens", "lengths", found.lengths, lambda value: f"{value:,.0f}")
        yield _histogram("Trained share", "shares", found.shares, lambda value: f"{value:.0%}")


def _histogram(name: str, style: str, values: Histogram, shown: Callable[[float], str]) -> str:
    highest = max(values.counts)
    bars = [
        f'<i style="height: {max(100 * count / highest, 1.5 if count else 0):.1f}%"'
        f' title="{shown(low)} to {shown(high)}: {count:,}"></i>'
        for (low, high), count in zip(pairwise(values.edges), values.counts, strict=True)
    ]
    return (
        f'<div class="card"><p><b>{name}</b> <span class="soft">median {shown(values.median)}, '
        f'95% up to {shown(values.most)}</span></p><div class="bars {style}">{"".join(bars)}</div>'
        f'<p class="axis"><span>{shown(values.edges[0])}</span><span>{shown(values.edges[-1])}</span></p></div>'
    )


# ---- the ledger -----------------------------------------------------------------------------------------------------


def _rejects(ledger: Ledger) -> Iterator[str]:
    if not ledger.rejects:
        return
    items = [f"<code>{_text(each.where)}</code> {_text(each.reason)}" for each in ledger.rejects[:_MAX_REJECTS]]
    if (more := len(ledger.rejects) - _MAX_REJECTS) > 0:
        items.append(f"... and {more:,} more; <code>loratune data check --json</code> lists all")
    yield f'<h2><span class="red">Rejected</span>: {_count(len(ledger.rejects), "row")}</h2>'
    yield _list(items)


def _notes(ledger: Ledger) -> Iterator[str]:
    if not ledger.notes:
        return
    yield "<h2>Worth a look</h2>"
    yield _list(
        f'{_text(name)} ({note.count:,})<br><span class="soft">{"<br>".join(map(_text, _examples(note)))}</span>'
        for name, note in ledger.notes.items()
    )


def _examples(note: Note) -> list[str]:
    return [*note.examples, "..."] if note.count > len(note.examples) else note.examples


def _list(items: Iterable[str]) -> str:
    return f'<ul class="card">{"".join(f"<li>{item}</li>" for item in items)}</ul>'


# ---- rows -----------------------------------------------------------------------------------------------------------


def _rows(rows: Sequence[Shown]) -> Iterator[str]:
    if not rows:
        return
    yield "<h2>Rows, token by token</h2>"
    yield (
        '<p class="legend"><span><mark>trained</mark></span><span><mark class="s">trained, special token</mark></span>'
        '<span>seen, not trained</span><span class="s">special token</span></p>'
    )
    for row in rows:
        yield f'<section class="card row">{"".join(_row(row))}</section>'


def _row(row: Shown) -> Iterator[str]:
    tokens = sum(map(len, row.documents))
    trained = sum(piece.trained for document in row.documents for piece in document)
    counts = f"{_count(tokens, 'token')}, {trained:,} trained" if row.reason is None else "rejected"
    yield f'<header><b>{_text(row.where)}</b><span class="soft">{counts}</span></header>'
    if row.reason is not None:
        yield f'<p class="red">{_text(row.reason)}</p>'
    for number, pieces in enumerate(row.documents, 1):
        if len(row.documents) > 1:
            yield f"<h3>part {number} of {len(row.documents)}</h3>"
        lines = "".join(f'<div dir="auto">{"".join(map(_token, span))}</div>' for span in spans(pieces))
        yield f'<div class="tokens">{lines}</div>'


def _token(piece: Piece) -> str:
    tag, style = "mark" if piece.trained else "span", ' class="s"' if piece.special else ""
    return f'<{tag}{style} title="token {piece.id}">{escape(visible(piece.text)) or _INSIDE}</{tag}>'


def _text(text: str) -> str:
    return escape(visible(text))


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
