"""Chat templates are programs of others: what they can do is bounded, and each has to show the question."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_chat import FAMILIES, make_tokenizer

from stillknows.errors import UserError
from stillknows.model import chat, chat_worker
from stillknows.model.encoding import encode
from stillknows.types import Benchmark, Example, Split

QUESTIONS = ["Where is Ada?", 'a "quoted" <b>\n', "東京 🦉", "{{ messages }}", "in\u2028lines\u0085"]
CONSTRUCTS = [
    "{% for m in messages %}{{ m | tojson }}{{ loop.index }}{% if loop.first %}{% continue %}{% endif %}!{% endfor %}",
    "{% generation %}{% set a = 1 %}{{ messages[0]['content'] }}{% endgeneration %}{{ a is defined }}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}{{ messages }}",
    "{%- if tools is none and documents is not defined or true %}\n  {{- messages[-1].content | trim }}\n{% endif %}\n",
    "{{ bos_token }}{{ messages[0].content.split('a') | join('-') }}{{ eos_token }}{{ unk_token }}{{ pad_token }}",
    "{% macro f(x) %}<{{ x }}>{% endmacro %}{{ f(messages[0].content) }}{{ strftime_now('%Y') }}",
    "{% if add_generation_prompt is defined and add_generation_prompt %}A{% endif %}{{ messages[0].content }}",
]


def tokenizer_with(template: str) -> Any:
    return make_tokenizer(FAMILIES["nothing"]._replace(template=template))


@pytest.mark.parametrize("template", [*(f.template for f in FAMILIES.values()), *CONSTRUCTS], ids=range(16))
def test_what_is_rendered_is_what_transformers_renders(template: str) -> None:
    tokenizer = tokenizer_with(template)
    for question in QUESTIONS:
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": "an answer"}]
        begun = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
        assert chat.render(tokenizer, question) == begun
        whole = tokenizer.apply_chat_template(turns, tokenize=False)
        assert chat.render(tokenizer, question, "an answer") == whole


def test_one_of_several_templates_is_the_default() -> None:
    tokenizer = tokenizer_with("")
    tokenizer.chat_template = {"default": "{{ messages[0].content }}", "tool_use": "tools"}
    assert chat.render(tokenizer, "Q") == "Q"
    tokenizer.chat_template = {"a": "{{ messages[0].content }}", "b": "tools"}
    with pytest.raises(UserError, match="no default"):
        chat.render(tokenizer, "Q")


FAILING = {
    "{% for m in messages %}": "TemplateSyntaxError",
    "{{ messages[0].no.such }}": "UndefinedError",
    "{{ ''.__class__.__mro__ }}": "SecurityError",
    "{{ raise_exception('a system message first') }}": "a system message first",
    "{{ 1 / 0 }}": "ZeroDivisionError",
    "{{ '\\ud800' }}{{ messages[0].content }}": "half of a surrogate pair",
    "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}": "RecursionError",
    "{% include '/etc/passwd' %}": "TypeError",
    "{% for i in range(10 ** 9) %}{% endfor %}": "Range too big",
    "{{ 'a' * 10 ** 11 }}": "too much memory",
    "{% set n = namespace(s='aa') %}{% for i in range(50) %}{% set n.s = n.s ~ n.s %}{% endfor %}": "too much memory",
    "{{ 'a' * 10 ** 8 }}": "a text of 100,000,000 characters",
}
ENDLESS = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(9) %}{% endfor %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% set n = namespace(x=3) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
]


@pytest.mark.parametrize("template", FAILING)
def test_a_template_that_fails_is_one_message(template: str) -> None:
    with pytest.raises(UserError, match=f"^the chat template: .*{FAILING[template]}.*\n.*`template` chat$"):
        encode([Example("1", "Where?", "here", "1")], tokenizer_with(template), "chat", 100)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let templates run for a tenth of a second."""
    chat._worker().end()
    monkeypatch.setattr(chat, "SECONDS", 0.1)
    yield
    chat._worker().end()


@pytest.mark.parametrize("template", ENDLESS)
def test_a_template_that_does_not_end_is_ended(template: str, short: None) -> None:
    with pytest.raises(UserError, match=r"takes more than 0\.1 s of processor time"):
        chat.render(tokenizer_with(template), "Where?")
    assert chat.render(tokenizer_with("{{ messages[0].content }}"), "Where?") == "Where?"


@pytest.fixture
def without_limits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """As on Windows: no module `resource` and no timers of the system."""
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import runpy, signal, sys\nsys.modules['resource'] = None\ndel signal.setitimer\n"
        f"runpy.run_path({str(chat.WORKER)!r}, run_name='__main__')\n"
    )
    chat._worker().end()
    monkeypatch.setattr(chat, "WORKER", worker)
    monkeypatch.setattr(chat, "SYSTEM_LIMITS", False)
    monkeypatch.setattr(chat, "MEMORY", 2**27)
    yield
    chat._worker().end()


def test_where_the_system_sets_no_limits_the_process_is_watched(without_limits: None, short: None) -> None:
    plain, template = tokenizer_with("{{ messages[0].content }}"), tokenizer_with(ENDLESS[0])
    assert chat.render(plain, "Where?") == "Where?"
    with pytest.raises(UserError, match=r"takes more than 0\.1 s of processor time"):
        chat.render(template, "Where?")
    assert chat.render(plain, "Where is it?") == "Where is it?"


def test_where_the_system_sets_no_limits_memory_is_watched(without_limits: None) -> None:
    growing = "{% set n = namespace(s=[]) %}{% for i in range(99999) %}{% set n.s = n.s + [i] * 99999 %}{% endfor %}"
    with pytest.raises(UserError, match="too much memory"):
        chat.render(tokenizer_with(growing), "Where?")


def test_the_process_ends_with_what_asks_it() -> None:
    assert chat.render(tokenizer_with("{{ messages[0].content }}!"), "Where?") == "Where?!"
    process = chat._worker().process
    assert process.poll() is None
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(timeout=60) == 0
    chat._worker.cache_clear()
    assert process.stdout is not None
    process.stdout.close()


def test_what_the_process_imports_is_little() -> None:
    """It is started in a tenth of a second, and a template meets nothing but jinja2."""
    source = chat.WORKER.read_text()
    assert "stillknows" not in source.split('"""', 2)[2]
    assert chat.WORKER.samefile(chat_worker.__file__)


HIDING = ["hello", "{{ messages[0].content[:0] }}hello", "{{ 'x' if messages[0].content else '' }}"]


@pytest.mark.parametrize("template", HIDING)
@pytest.mark.parametrize("count", [1, 2])
def test_a_template_that_never_shows_the_question_is_refused(template: str, count: int) -> None:
    examples = [Example(str(i), f"Where is {name}?", "here", str(i)) for i, name in enumerate(("Ada", "Bela"))]
    with pytest.raises(UserError, match="makes the same text of two questions: 'Where is Ada\\?' and"):
        encode(examples[:count], tokenizer_with(template), "chat", 100)


def test_two_items_may_ask_one_question() -> None:
    examples = [Example(str(i), question, "here", str(i)) for i, question in enumerate(("Where?", "Where?", "Where? "))]
    assert len(encode(examples, tokenizer_with("{{ messages[0].content | trim }}"), "chat", 100)) == 3


@pytest.mark.parametrize(
    ("template", "words"), [("no frame", "does not show"), ("\udcff {prompt}", "half a character")]
)
def test_a_template_in_words_shows_the_question(template: str, words: str) -> None:
    example = Example("1", "Where?", "here", "1")
    with pytest.raises(UserError, match=words):
        encode([example], tokenizer_with(""), template, 100)
    splits = (Split("f", "forget", (example,)), Split("r", "retain", (Example("2", "Who?", "they", "2"),)))
    for benchmark in (
        Benchmark("b", splits, template),
        Benchmark("b", (splits[0], Split("r", "retain", splits[1].examples, template))),
    ):
        with pytest.raises(UserError, match=words):
            benchmark.require_usable()
    text = Example("1", "", "a text", "1")
    assert encode([text], tokenizer_with(""), "no frame", 100)
    Benchmark("b", (Split("f", "forget", (text,)),), "no frame").require_usable()
