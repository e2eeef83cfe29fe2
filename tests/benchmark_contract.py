"""What every benchmark promises, in one place for all of their tests."""

from __future__ import annotations

from stillknows.model.encoding import EncodedAnswer
from stillknows.types import Benchmark
from stillknows.unlearning import alternative_answers


def assert_contract(benchmark: Benchmark) -> None:
    """Splits with items, ids that are unique, texts without loose spaces, something to forget and something to keep.

    Methods that train with refusals can train on it: each question and each plain text can be answered by one.
    """
    benchmark.require_usable()
    for role in ("forget", "retain"):
        items = [EncodedAnswer(example, (1, 2), 1, True) for example in benchmark.split(role).examples]
        alternative_answers.check(items, frozenset({"refusal"}), [], benchmark.spec)
    names = [split.name for split in benchmark.splits]
    assert len(set(names)) == len(names)
    assert benchmark.split("forget").examples
    assert benchmark.split("retain").examples
    for split in (*benchmark.training, *benchmark.splits):
        assert split.examples
        assert len({e.id for e in split.examples}) == len(split.examples)
        assert "{prompt}" in (split.template or benchmark.template) or benchmark.template == "chat"
        for e in split.examples:
            assert all((e.id, e.answer, e.fact))
            for words in (e.prompt, e.answer, *e.wrong, e.paraphrase or "-"):
                assert words == words.strip()
            assert e.answer not in e.wrong
            assert all(e.wrong)
    for splits in (benchmark.training, benchmark.splits):
        forgotten = {e.fact for split in splits if split.role == "forget" for e in split.examples}
        kept = {e.fact for split in splits if split.role != "forget" for e in split.examples}
        assert not forgotten & kept
