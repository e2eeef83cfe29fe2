"""Texts of others on a terminal and in Markdown: shown as they are, and nothing more."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from stillknows.formatting import code, for_markdown, for_terminal, markdown_table, one_line

PIECES = ["<script>", "</a>", "<!--", "[a](http://b.c)", "![i](x)", "[1]: http://x", "[1]", "``", "`", "**", "__", "_"]
PIECES += ["~~", "|", "\\", "\\|", "&lt;", "#", "# ", "- ", "+ ", "1. ", "2) ", "> ", "---", "***", "===", "http://a.b"]
PIECES += ["www.a.b", "a@b.c", "<http://a>", "\x1b[31m", "\x1b]8;;http://x\x07", "\x9b2J", "\u202e", "\u2066", "\u200b"]
PIECES += [
    "\n",
    "\r\n",
    "\t",
    "    ",
    "\x00",
    "\x7f",
    "\ud800",
    "\u2028",
    "\ufeff",
    "npo",
    "é",
    "语",
    "\u200d",
]
pieces = st.lists(st.sampled_from(PIECES))
texts = st.one_of(st.text(), pieces.map("".join), pieces.map(" ".join))
PARSER = MarkdownIt("commonmark").enable(["table", "strikethrough"])


@given(texts)
def test_nothing_steers_a_terminal(text: str) -> None:
    shown = for_terminal(text)
    allowed = {"\n", "\t", "\u200c", "\u200d"}
    assert {c for c in shown if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")} <= allowed
    shown.encode("utf-8")
    assert for_terminal(shown) == shown
    assert "\n" not in one_line(text)


@given(st.text(st.characters(categories=["L", "M", "N", "P", "S", "Zs"], include_characters="\n\t")))
def test_letters_of_all_languages_stay(text: str) -> None:
    assert for_terminal(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred", r"\x1b[31mred"),
        ("a\u202eb", r"a\u202eb"),
        ("a\rb", r"a\rb"),
        ("a\ud800", r"a\ud800"),
        ("é", "é"),
    ],
)
def test_codes_are_written_as_in_python(text: str, shown: str) -> None:
    assert for_terminal(text) == shown


def words(source: str) -> tuple[set[str], str]:
    """Return the kinds of tokens that Markdown is parsed into, within paragraphs too, and its text."""
    tokens = PARSER.parse(source)
    children = [child for token in tokens for child in token.children or ()]
    return {token.type for token in (*tokens, *children)}, "".join(child.content for child in children)


@given(texts)
@example("- ")
@example("1. a")
@example("[1](a)")
def test_markdown_shows_text_as_it_is(text: str) -> None:
    found, content = words(for_markdown(text))
    assert found <= {"paragraph_open", "inline", "text", "paragraph_close"}
    assert content == one_line(text)


@given(texts)
def test_code_holds_any_text(text: str) -> None:
    found, content = words(code(text))
    if one_line(text):
        assert found == {"paragraph_open", "inline", "code_inline", "paragraph_close"}
        assert content == one_line(text)


@given(st.lists(st.lists(texts, min_size=2, max_size=2), min_size=1, max_size=3))
def test_no_cell_breaks_a_table(rows: list[list[str]]) -> None:
    table = markdown_table(["a", "b"], [[for_markdown(cell) for cell in row] for row in rows])
    tokens = PARSER.parse(table)
    cells = [t.content for t in tokens if t.type == "inline"]
    assert len(cells) == 2 * (1 + len(rows))
    assert tokens[0].type == "table_open"
    shown = ["".join(child.content for child in t.children or ()) for t in tokens if t.type == "inline"]
    assert shown[2:] == [one_line(cell) for row in rows for cell in row]


@pytest.mark.parametrize(
    "name", ["npo-float32", "answer_probability", "rtn:bits=4:group=128", "bf16+int4", "runs/a.b", "0.5"]
)
def test_usual_names_are_left_as_they_are(name: str) -> None:
    assert for_markdown(name) == name
