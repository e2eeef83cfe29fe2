"""MUSE: the files of its layout in all their forms, and the prompts that are made of them, word by word."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from benchmark_contract import assert_contract

from stillknows.errors import UserError
from stillknows.model.encoding import encode
from stillknows.registry import bind
from stillknows.types import Benchmark, Decoding, Example, Split

MEASURED = {
    "knowmem/forget_qa": 100,
    "knowmem/forget_qa_icl": 10,
    "knowmem/retain_qa": 100,
    "knowmem/retain_qa_icl": 10,
    "verbmem/forget": 100,
    "privleak/forget": 100,
    "privleak/retain": 100,
    "privleak/holdout": 100,
}


def make(spec: str) -> Benchmark:
    return bind("benchmark", spec)()


def write(path: Path, items: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(items, indent=1))


def content(name: str, count: int) -> list[Any]:
    """Items in the published form of a file: texts in privleak, objects elsewhere."""
    if name.startswith("privleak"):
        return [f"{name} {i}" for i in range(count)]
    if name.startswith("verbmem"):
        return [{"prompt": f"Once {i}", "gt": f"upon a time {i}"} for i in range(count)]
    return [{"question": f"{name} {i}?", "answer": f"a{i}"} for i in range(count)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A stand-in for MUSE-News: 3 items in each measured file, 2 in-context pairs, 2 articles in each corpus."""
    for name in MEASURED:
        write(tmp_path / f"{name}.json", content(name, 2 if name.endswith("icl") else 3))
    for name in (
        "raw/forget",
        "raw/retain1",
        *(f"{fold}/forget_{k}" for fold in ("scal", "sust") for k in range(1, 5)),
    ):
        write(tmp_path / f"{name}.json", [f"{name} one.", f"{name} two."])
    return tmp_path


@pytest.fixture
def muse(folder: Path) -> Callable[..., Benchmark]:
    """Return muse(options): the benchmark made of the stand-in."""
    return lambda options="": make(f"muse:subset=true:data={folder}{options}")


def splits(benchmark: Benchmark) -> dict[str, Split]:
    return {split.name: split for split in benchmark.splits}


def trained(benchmark: Benchmark) -> dict[str, str]:
    """The texts that are trained on, by split; each is one example."""
    return {split.name: split.examples[0].answer for split in benchmark.training if len(split.examples) == 1}


def test_it_keeps_the_contract(muse: Callable[..., Benchmark]) -> None:
    assert_contract(muse())


def test_splits_with_their_roles(muse: Callable[..., Benchmark]) -> None:
    assert [(s.name, s.role, len(s.examples)) for s in muse().splits] == [
        ("verbmem", "forget", 3),
        ("knowmem_forget", "forget", 3),
        ("knowmem_retain", "retain", 3),
        ("privleak_forget", "member", 3),
        ("privleak_retain", "member", 3),
        ("privleak_holdout", "holdout", 3),
    ]


def test_verbatim_memorisation(muse: Callable[..., Benchmark]) -> None:
    split = splits(muse())["verbmem"]
    assert split.examples[1] == Example("verbmem-2", "Once 1", "upon a time 1", "verbmem-2")
    assert (split.template, split.decoding, split.answer_tokens) == ("{prompt}", Decoding(new_tokens=128), 128)


def test_knowledge_is_asked_for_after_in_context_pairs(muse: Callable[..., Benchmark]) -> None:
    split = splits(muse())["knowmem_forget"]
    assert split.template == (
        "Question: knowmem/forget_qa_icl 0?\nAnswer: a0\n\n"
        "Question: knowmem/forget_qa_icl 1?\nAnswer: a1\n\n"
        "Question: {prompt}\nAnswer:"
    )
    assert split.examples[2] == Example("forget_qa-3", "knowmem/forget_qa 2?", "a2", "forget_qa-3")
    assert split.decoding == Decoding(new_tokens=32, stop=("\n\n", "\nQuestion", "Question:"))
    retain = splits(muse())["knowmem_retain"]
    assert retain.template is not None
    assert retain.template.startswith("Question: knowmem/retain_qa_icl 0?\nAnswer: a0\n\n")


def test_in_context_pairs_may_speak_of_prompts(muse: Callable[..., Benchmark], folder: Path, tokenizer: Any) -> None:
    """What looks like the place of the question, inside a pair or inside the question, stays as it is."""
    write(folder / "knowmem/forget_qa_icl.json", [{"question": "What is {prompt}?", "answer": "A place"}])
    write(folder / "knowmem/forget_qa.json", [{"question": "And {prompt}?", "answer": "a"}])
    split = splits(muse())["knowmem_forget"]
    read: list[str] = []

    def recording(text: str, **options: Any) -> Any:
        read.append(text)
        return tokenizer(text, **options)

    for name in ("bos_token_id", "eos_token_id"):
        setattr(recording, name, getattr(tokenizer, name))
    assert split.template is not None
    encode(split.examples, recording, split.template, context=512)  # type: ignore[arg-type]
    prompt = "Question: What is {prompt}?\nAnswer: A place\n\nQuestion: And {prompt}?\nAnswer:"
    assert set(read) == {prompt, f"{prompt} a"}


def test_membership_texts_have_no_prompt(muse: Callable[..., Benchmark]) -> None:
    split = splits(muse())["privleak_holdout"]
    assert split.examples[0] == Example("privleak_holdout-1", "", "privleak/holdout 0", "privleak_holdout-1")
    assert split.piece_tokens is None


def test_training_texts_are_joined_and_cut(muse: Callable[..., Benchmark]) -> None:
    benchmark = muse()
    assert [(s.name, s.role, s.piece_tokens) for s in benchmark.training] == [
        ("forget", "forget", 2048),
        ("retain", "retain", 2048),
    ]
    assert trained(benchmark) == {
        "forget": "raw/forget one.\n\nraw/forget two.",
        "retain": "raw/retain1 one.\n\nraw/retain1 two.",
    }


def test_plain_text_is_taken_before_json(muse: Callable[..., Benchmark], folder: Path) -> None:
    (folder / "raw/forget.txt").write_text("\ufeffAll of it.\n\nAnd more.\n", encoding="utf-8")
    assert trained(muse())["forget"] == "All of it.\n\nAnd more."


@pytest.mark.parametrize("fold", [1, 2, 3, 4])
@pytest.mark.parametrize(("option", "name"), [("scalability", "scal"), ("sustainability", "sust")])
def test_folds_replace_the_forget_set(muse: Callable[..., Benchmark], option: str, name: str, fold: int) -> None:
    benchmark = muse(f":{option}={fold}")
    assert benchmark.spec == f"muse:news:{option}={fold}"
    assert trained(benchmark) == {
        "forget": f"{name}/forget_{fold} one.\n\n{name}/forget_{fold} two.",
        "retain": "raw/retain1 one.\n\nraw/retain1 two.",
    }
    assert benchmark.splits == muse().splits


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (":scalability=5", "scalability=5 is not 1 to 4"),
        (":sustainability=0", "sustainability=0 is not 1 to 4"),
        (":scalability=1:sustainability=1", "two ways to choose the forget set\n  give one"),
        (":corpus=books:scalability=2", "scalability was published for the news corpus only"),
        (":corpus=poems", "muse:corpus=poems is not known"),
    ],
)
def test_folds_that_do_not_exist(muse: Callable[..., Benchmark], options: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        muse(options)


@pytest.mark.parametrize(("corpus", "auc"), [("news", "0.4772"), ("books", "0.5393")])
def test_published_figures(muse: Callable[..., Benchmark], corpus: str, auc: str) -> None:
    benchmark = muse(f":corpus={corpus}")
    assert benchmark.spec == f"muse:{corpus}"
    assert benchmark.figures == ("verbmem", "knowmem", f"privleak:auc_retrain={auc}")


def test_both_corpora_side_by_side(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    both = tmp_path_factory.mktemp("data")
    (both / "news").symlink_to(folder)
    assert len(make(f"muse:subset=true:data={both}").splits) == 6
    with pytest.raises(UserError, match=f"MUSE books needs files that are missing in {both}: raw/forget.txt, "):
        make(f"muse:corpus=books:subset=true:data={both}")


def test_older_copies_say_retain2(muse: Callable[..., Benchmark], folder: Path) -> None:
    before = muse()
    for name in ("knowmem/retain_qa", "knowmem/retain_qa_icl", "privleak/retain"):
        (folder / f"{name}.json").rename(folder / f"{name.replace('retain', 'retain2')}.json")
    assert muse() == before


def test_every_missing_file_is_named_at_once(folder: Path) -> None:
    for name in ("raw/forget", "knowmem/retain_qa", "privleak/holdout"):
        (folder / f"{name}.json").unlink()
    with pytest.raises(UserError) as error:
        make(f"muse:data={folder}")
    assert str(error.value) == (
        f"MUSE news needs files that are missing in {folder}: "
        "raw/forget.txt, knowmem/retain_qa.json, privleak/holdout.json\n"
        "  give a folder with MUSE news's files as `data`"
    )


@pytest.mark.parametrize("name", MEASURED)
def test_a_file_without_its_published_number_of_items(folder: Path, name: str) -> None:
    for other, count in MEASURED.items():
        write(folder / f"{other}.json", content(other, count))
    assert [len(s.examples) for s in make(f"muse:data={folder}").splits] == [100] * 6
    write(folder / f"{name}.json", content(name, 9))
    message = f"{folder / name}.json holds 9 items, {MEASURED[name]} were published"
    with pytest.raises(UserError, match=re.escape(message)):
        make(f"muse:data={folder}")


@pytest.mark.parametrize(
    ("name", "item", "message"),
    [
        ("verbmem/forget", {"prompt": "p"}, "'gt' is missing, empty or not a text"),
        ("verbmem/forget", {"prompt": "", "gt": "g"}, "'prompt' is missing, empty"),
        ("knowmem/forget_qa", {"question": "q", "answer": ["a"]}, "'answer' is missing, empty or not a text"),
        ("knowmem/retain_qa_icl", "Q and A", "'question' is missing"),
        ("privleak/holdout", "  ", "'text' is missing, empty"),
        ("privleak/holdout", 7, "expected an object, got int"),
        ("raw/retain1", {"passage": "t"}, "'text' is missing"),
    ],
)
def test_bad_items_are_named_with_file_and_number(
    muse: Callable[..., Benchmark], folder: Path, name: str, item: Any, message: str
) -> None:
    path = folder / f"{name}.json"
    write(path, [*json.loads(path.read_text()), item])
    number = len(json.loads(path.read_text()))
    with pytest.raises(UserError, match=re.escape(f"{path}: item {number}: {message}")):
        muse()
