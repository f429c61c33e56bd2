"""The process in which chat templates run: a script that imports the standard library and jinja2, nothing else.

It reads JSON lines, a head {template, variables, now, cpu_seconds, rows} and one line per row {messages, tools, jobs},
and answers each row with one line: a list of renderings, or {"error": reason}. A job is [messages, open turn, tools].
The environment is that of `transformers`: the same options, filters, globals and tags, so the bytes are the same.
"""

import json
import signal
import sys
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

MAX_BYTES = 2**30  # address space, of which Python and jinja2 take about 50 MiB
MAX_CHARACTERS = 2**26  # of one rendering
_now = datetime.min


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` ... `{% endgeneration %}` marks an answer; what it renders is what stands inside."""

    tags = {"generation"}  # noqa: RUF012  # jinja2's own declaration

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_inside"), [], [], body).set_lineno(line)

    def _inside(self, caller: Any) -> str:
        return caller()


class _Dict:
    """`dict(...)` and `dict.fromkeys` without the class itself, through which Python could be reached."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Any, value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


class _Namespace(jinja2.utils.Namespace):
    """A namespace that takes no name beginning with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            _refuse_private(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: Any) -> None:
    if str(name).startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace takes no name beginning with an underscore, found {name!r}")


def _raise_exception(message: Any) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(format: str) -> str:
    return _now.strftime(format)


def _environment() -> jinja2.Environment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    own: dict[str, Any] = {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    environment.globals.update(own)
    return environment


def _warm_up() -> None:
    """Makes jinja2 import what it imports at first use (codecs, error handling): later no file can be opened."""
    with suppress(jinja2.exceptions.UndefinedError):
        _environment().from_string("{{ 'é\n' | pprint }}{{ messages[0].role }}").render()


@lru_cache(maxsize=16)
def _compiled(source: str) -> jinja2.Template:
    template = _environment().from_string(source)
    template.globals = dict(template.globals)  # jinja2 copies them for each rendering, a ChainMap in half its time
    return template


def _limit_resources() -> None:
    """No more memory than MAX_BYTES, no new file, socket or core dump; where the system has no such limits, none."""
    try:
        import resource
    except ImportError:  # Windows
        return
    soft_limits = {resource.RLIMIT_AS: MAX_BYTES, resource.RLIMIT_CORE: 0, resource.RLIMIT_NOFILE: 3}
    for limit, value in soft_limits.items():
        resource.setrlimit(limit, (value, value))


def _restart_clock(seconds: float) -> None:
    """The kernel ends this process after so much processor time, whatever it is doing; 0 stops the clock."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


def _render_row(head: dict[str, Any], row: dict[str, Any]) -> list[str | int]:
    """Returns the rendering of each job; one that the first begins with is given as its number of characters."""
    jobs = [tuple(job) for job in row["jobs"]]
    texts = {job: _render(head, row, *job) for job in dict.fromkeys(jobs)}
    whole = texts[jobs[0]]
    return [whole, *(len(texts[job]) if whole.startswith(texts[job]) else texts[job] for job in jobs[1:])]


def _render(head: dict[str, Any], row: dict[str, Any], count: int, open_turn: bool, with_tools: bool) -> str:
    _restart_clock(head["cpu_seconds"])
    text = _compiled(head["template"]).render(
        messages=row["messages"][:count],
        tools=row["tools"] if with_tools else None,
        documents=None,
        add_generation_prompt=open_turn,
        **head["variables"],
    )
    if len(text) > MAX_CHARACTERS:
        raise MemoryError
    return text


def _answer(head: dict[str, Any], line: bytes) -> bytes:
    try:
        reply = json.dumps(_render_row(head, json.loads(line)), ensure_ascii=False)
    except MemoryError:
        reply = json.dumps({"error": f"it needs more than {MAX_BYTES >> 20} MiB of memory"})
    except Exception as error:  # a template is a program from elsewhere: whatever it raises is about this row
        reply = json.dumps({"error": (str(error) or type(error).__name__)[:500]})
    _restart_clock(0)
    return reply.encode("utf-8", "surrogatepass") + b"\n"


def _serve() -> None:
    global _now
    while line := sys.stdin.buffer.readline():
        head = json.loads(line)
        _now = datetime.fromisoformat(head["now"])
        rows = [sys.stdin.buffer.readline() for _ in range(head["rows"])]  # all, before the first answer fills the pipe
        for row in rows:
            sys.stdout.buffer.write(_answer(head, row))
            sys.stdout.buffer.flush()  # so that the reader knows which row was at work when the process ends


if __name__ == "__main__":
    if hasattr(signal, "SIGPROF"):
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
    _warm_up()
    _limit_resources()
    _serve()
