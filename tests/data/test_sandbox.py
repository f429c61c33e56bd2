"""Hostile templates: what they reach, how long they run, what they cost the rows beside them."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
from toy_tokenizer import CHATML, FAMILIES, build

from loratune.data import sandbox
from loratune.data.encode import Encoder
from loratune.data.rows import Row
from loratune.data.sandbox import Request, Sandbox, Template
from loratune.data.templates import NOW
from loratune.errors import DataError

MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
WHOLE = [(2, False, True)]


@pytest.fixture
def box() -> Iterator[Sandbox]:
    made = Sandbox()
    render(made, "{{ 1 }}")  # the process is up before a test counts seconds
    yield made
    if made._process is not None:
        sandbox._close(made._process)


def template(source: str) -> Template:
    return Template(source, {"bos_token": "<s>"}, NOW, "chat template of toy")


def render(box: Sandbox, source: str, *requests: Request) -> list[Any]:
    return box.render(template(source), requests or [Request(MESSAGES, None, WHOLE)])


def test_renderings_come_in_the_order_of_rows_and_jobs(box: Sandbox) -> None:
    source = "{{ bos_token }}{% for m in messages %}{{ m.content }}.{% endfor %}{{ '>' if add_generation_prompt }}"
    rows = [
        Request(
            [{"content": f"{i} Київ \u2028\n"}, {"content": "b"}],
            None,
            [(2, False, True), (1, True, True), (1, False, True)],
        )
        for i in range(700)
    ]
    expected = [[f"<s>{i} Київ \u2028\n.b.", f"<s>{i} Київ \u2028\n.>", f"<s>{i} Київ \u2028\n."] for i in range(700)]
    assert render(box, source, *rows) == expected


def test_rows_larger_than_the_pipes_do_not_block(box: Sandbox) -> None:
    rows = [Request([{"content": "я" * 300_000}], None, [(1, False, True)] * 3) for _ in range(40)]
    assert all(texts == ["я" * 300_000] * 3 for texts in render(box, "{{ messages[0].content }}", *rows))


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__ }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ lipsum.__globals__['os'].system('id') }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context.environment }}",
    "{{ raise_exception.__globals__.os }}",
    "{{ (messages | attr('__class__')).__mro__ }}",
    "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "{{ '{0.__class__}'.format_map({'0': 1}) }}",
    "{% set f = ''.format %}{{ f.__self__.x }}",
    "{{ ['{0.__class__}'] | map('format', messages) | join }}{{ ''.__class__ }}",
    "{{ ''|attr('\\x5f\\x5fclass\\x5f\\x5f')|attr('mro') }}{{ x.y.z }}",
    "{% set ns = namespace(__class__=1) %}",
    "{{ dict.__class__.__mro__ }}",
    "{% set _ = dict.update(messages[0], {'content': 'x'}) %}",
    "{% set _ = messages.append(1) %}",
    "{% set _ = messages[0].update({'content': 'x'}) %}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{{ (messages | map(attribute='__class__') | list)[0].mro() }}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_an_escape_ends_as_a_refusal(box: Sandbox, source: str) -> None:
    [error] = render(box, source)
    assert isinstance(error, DataError) and str(error).startswith("the chat template of toy refuses the messages: ")
    assert render(box, "{{ messages | length }}") == [["2"]]


LOOPS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n < 40 %}{{ f(n + 1) }}{{ f(n + 1) }}{% endif %}{% endmacro %}{{ f(1) }}",
    "number": "{{ 7 ** (10 ** 9) }}",  # inside one operation of Python, which no signal handler interrupts
    "number_of_the_row": "{{ messages | length ** (10 ** 9) }}{{ (messages | length) ** (10 ** 10) }}",
    "texts": "{% for i in range(99999) %}{{ ('ab' * (99998 + i % 2)) | upper | length }}{% endfor %}",
}


@pytest.mark.parametrize("source", LOOPS.values(), ids=LOOPS.keys())
def test_an_endless_template_is_stopped_within_a_second_and_named(source: str) -> None:
    tokenizer = build(FAMILIES["chatml"])
    encoder = Encoder(tokenizer, None)
    encoder.encode(Row("rows.jsonl", 1, "messages", {"messages": MESSAGES}))  # the process is up
    tokenizer.chat_template = source
    tokenizer.name_or_path = "evil/model"
    started = time.perf_counter()
    reason = r"^rows.jsonl:7: the chat template of evil/model was stopped: it ran longer than 0.7 s"
    with pytest.raises(DataError, match=reason):
        encoder.encode(Row("rows.jsonl", 7, "messages", {"messages": MESSAGES}))
    assert time.perf_counter() - started < 3  # 0.7 s of processor time; the rest is for a machine with other work
    tokenizer.chat_template = CHATML
    assert len(encoder.encode(Row("rows.jsonl", 8, "messages", {"messages": MESSAGES}))) == 1


BOMBS = [
    "{{ 'a' * 10**11 }}",
    "{{ 'a' * (10**9) }}",
    "{{ '%099999999999d' | format(1) }}",
    "{{ 'a'.center(10**10) }}",
    "{{ [[0] * 10**7] * 10**4 | string }}",
    "{{ range(10**9) | list }}",
    "{% set ns = namespace(x='a') %}{% for i in range(64) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
]


@pytest.mark.parametrize("source", BOMBS)
def test_a_memory_bomb_is_refused_or_stopped(box: Sandbox, source: str) -> None:
    started = time.perf_counter()
    [error] = render(box, source)
    assert isinstance(error, DataError) and time.perf_counter() - started < 3
    assert render(box, "{{ messages | length }}") == [["2"]]


def test_the_memory_of_a_template_is_limited(box: Sandbox) -> None:
    [error] = render(box, "{{ ('a' * (2 * 10**9)) | length }}")
    assert str(error) == "the chat template of toy refuses the messages: it needs more than 1024 MiB of memory."


def test_the_rows_beside_a_stopped_one_are_rendered_in_their_order(box: Sandbox) -> None:
    source = "{{ messages[0].n ** (10 ** 9) if messages[0].n > 1 else messages[0].content }}"
    rows = [Request([{"content": text, "n": n}], None, [(1, False, True)]) for text, n in zip("a-b-c", [1, 7, 1, 7, 1])]
    results = render(box, source, *rows)
    assert [results[0], results[2], results[4]] == [["a"], ["b"], ["c"]]
    assert all("was stopped" in str(results[i]) for i in (1, 3))


def test_after_three_stops_a_template_is_not_run_again_and_others_are(box: Sandbox) -> None:
    started = time.perf_counter()
    results = render(box, "{{ messages[0].n ** (10 ** 9) }}", *[Request([{"n": 7}], None, [(1, False, True)])] * 500)
    assert time.perf_counter() - started < 5
    assert "was stopped" in str(results[2])
    assert {str(error) for error in results[3:]} == {
        "the chat template of toy was stopped on 3 rows before; it is not run again."
    }
    assert render(box, "{{ messages | length }}") == [["2"]]


def test_a_process_that_dies_between_two_batches_is_replaced(box: Sandbox) -> None:
    assert box._process is not None
    box._process.kill()
    box._process.wait()
    assert render(box, "{{ messages | length }}") == [["2"]]


def test_an_interrupted_exchange_leaves_no_stale_answer(box: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sandbox, "_texts", interrupt)
        with pytest.raises(KeyboardInterrupt):
            render(box, "stale", *[Request(MESSAGES, None, WHOLE)] * 3)
    assert render(box, "fresh") == [["fresh"]]


def test_a_forked_child_has_a_process_of_its_own(box: Sandbox) -> None:
    assert box._process is not None
    pid = box._process.pid
    child = os.fork()
    if child == 0:
        os._exit(0 if render(box, "{{ messages | length }}") == [["2"]] and box._process.pid != pid else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert render(box, "parent") == [["parent"]]


def test_the_process_can_open_no_file_and_imports_neither_torch_nor_transformers() -> None:
    script = (
        "import sys; sys.argv = ['x']; import runpy; worker = runpy.run_path(sys.stdin.readline().strip())\n"
        "worker['_warm_up'](); worker['_limit_resources']()\n"
        "assert not {'torch', 'transformers', 'numpy', 'loratune'} & set(sys.modules)\n"
        "try: open('/etc/passwd')\n"
        "except OSError: print('closed')\n"
    )
    path = sandbox.__file__.replace("sandbox.py", "sandbox_worker.py")
    done = subprocess.run([sys.executable, "-c", script], input=path + "\n", capture_output=True, text=True)
    assert done.stdout == "closed\n", done.stderr


def test_the_clock_of_a_template_stands_still() -> None:
    tokenizer = build(FAMILIES["chatml"])
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y %H:%M:%S') }}" + CHATML
    document = Encoder(tokenizer, None).encode(Row("f", 1, "messages", {"messages": MESSAGES}))[0]
    assert tokenizer.decode(document.input_ids).startswith("26 Jul 2024 00:00:00<")
