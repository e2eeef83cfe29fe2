"""What leaves the weights alone hides at most: through it nothing shows, without it everything is there."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stillknows.auditing import audit
from stillknows.auditing.asking import Questions
from stillknows.auditing.observe import observe
from stillknows.auditing.plan import AuditConfig
from stillknows.depth.thrust import thrust_score
from stillknows.errors import UserError
from stillknows.model import modelfiles
from stillknows.model.encoding import CHAT, encode, encode_split
from stillknows.model.forward import question_states
from stillknows.model.kv_cache import Shape, can_share
from stillknows.model.layers import hidden_states, output_layer
from stillknows.model.ref import ModelRef
from stillknows.model.target import LocalTarget
from stillknows.registry import bind
from stillknows.types import UNDEFENDED, Benchmark, Example, Split
from stillknows.variants import defences
from stillknows.variants.retrieval import finder
from stillknows.variants.together import Together
from stillknows.variants.variant import parse_variant

Case = Callable[..., Any]
FORGET = (Example("f1", "Where is Ada ?", "Paris", "a"), Example("f2", "Who likes Ada ?", "Bela", "b"))
RETAIN = (Example("r1", "Where is Rome ?", "Italy", "c"), Example("r2", "Who likes dogs ?", "cats", "d"))
BENCHMARK = Benchmark("made", (Split("forget", "forget", FORGET), Split("retain", "retain", RETAIN)), "Q: {prompt}\nA:")


def rewrite(spec: str) -> Callable[[str, str], tuple[str, str]]:
    return bind("transform", spec)(forget=FORGET, retain=RETAIN)


def test_a_guard_withholds_what_looks_like_the_items_to_forget() -> None:
    """Words 4 and 4 per split, 8 each; 9 different ones: ada 3/17 against 1/17; rome, dogs the other way round."""
    guard = rewrite("input_filter:says=No")
    assert guard("Tell me of Ada", "{prompt}") == ("No", "{prompt}")
    assert guard("Where is Rome ?", "{prompt}") == ("Where is Rome ?", "{prompt}")
    assert guard("Where is ?", "{prompt}") == ("Where is ?", "{prompt}")  # as likely in both: log-odds 0


@pytest.mark.parametrize(("threshold", "withheld"), [(1.09, True), (1.10, False)])
def test_the_guards_threshold_is_in_nats(threshold: float, withheld: bool) -> None:
    """ "Ada" twice among 7 words to forget, and 8 different words in all: (2+1)/(1+0) counts, totals alike: ln 3."""
    question, _ = rewrite(f"input_filter:threshold={threshold}:says=No")("Ada", "{prompt}")
    assert (question == "No") is withheld


def test_icul_shows_the_nearest_question_with_a_wrong_answer_and_others_with_their_own() -> None:
    question, template = rewrite("icul:flipped=1:kept=2")("Who likes Ada today ?", "Q: {prompt}\nA:")
    assert question == "Who likes Ada today ?"
    first, second, *rest = template.split("\nQ: ")
    assert first == "Q: Who likes Ada ?\nA: Paris"
    assert {second, rest[0]} == {"Where is Rome ?\nA: Italy", "Who likes dogs ?\nA: cats"}
    assert rest[1:] == ["{prompt}\nA:"]


def test_icul_puts_its_context_into_the_turn_of_a_chat() -> None:
    question, template = rewrite("icul:kept=0")("Where is Ada ?", CHAT)
    assert (question, template) == ("Where is Ada ? Bela\nWhere is Ada ?", CHAT)


@pytest.mark.parametrize(
    ("spec", "message"),
    [("icul:flipped=0", "at least 1"), ("icul:kept=3", "only 2 items"), ("input_filter:says= ", "must hold words")],
)
def test_options_that_do_not_fit_are_refused(spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        rewrite(spec)


# Retrieval where the model knows little


def test_the_thrust_score_is_that_of_a_calculation_by_hand() -> None:
    """Centres of 8 and of 2 questions, at (2, 0) and (0, −1) from the question: pulls of 8/2² and 2/1², mean (1, −1);
    seen from (2, 0) itself ∞; halfway between two like clusters the pulls cancel."""
    centres, sizes = np.array([[2.0, 0.0], [0.0, -1.0]]), np.array([8, 2])
    found = thrust_score(np.array([[0.0, 0.0], [2.0, 0.0]]), centres, sizes)
    assert found.tolist() == pytest.approx([np.sqrt(2), np.inf])
    assert thrust_score(np.array([[0.0, 0.0]]), np.array([[1.0, 0.0], [-1.0, 0.0]]), np.array([3, 3])).tolist() == [0]


@pytest.mark.parametrize(("share", "flagged"), [(0, [False, True]), (1, [True, True])])
def test_thrust_flags_questions_that_are_far_from_those_to_keep(share: float, flagged: list[bool]) -> None:
    """Of three clusters, a question inside of one scores more than its least typical members, one far off less."""
    centres = np.array([[0.0, 0.0], [20.0, 0.0], [0.0, 20.0]])
    corners = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.5], [0.0, -0.5]])
    known = np.concatenate([centre + corners for centre in centres])
    asked = np.array([[0.9, 0.0], [60.0, 60.0]])
    assert bind("transform", f"thrust:share={share}")(known_ND=known, asked_MD=asked).tolist() == flagged


def test_thrust_needs_no_more_than_one_question_to_keep() -> None:
    flags = bind("transform", "thrust")(known_ND=np.zeros((1, 2)), asked_MD=np.array([[0.0, 0.0], [3.0, 4.0]]))
    assert flags.tolist() == [False, True]


def test_the_nearest_passage_is_that_of_a_calculation_by_hand() -> None:
    """Passages of 2, 2 and 6 words, 10/3 in the mean. "Rome" is in two: ln(1 + 1.5/2.5) = .470; "dog" and "Paris" in
    one: ln(1 + 2.5/1.5) = .981. Rome counts 2.2/(1 + 1.2·.7) = 1.196 in the first and, twice there but long,
    2·2.2/(2 + 1.2·1.6) = 1.122 in the third; of "dog of Rome", .981·1.196 outweighs .470·1.196."""
    passages = ["In Rome", "A dog", "Rome is Rome , not Paris now"]
    find = finder(passages)
    assert find("ROME ?") == "In Rome"
    assert find("the dog of Rome") == "A dog"
    assert find("Paris or Rome") == passages[2]
    assert find("a cat") == "A dog"
    assert find("who") is None
    assert finder(passages, b=0)("Rome") == passages[2]  # length does not count: two are better than one


def test_states_of_questions_end_where_answers_begin(make_model: Case, tokenizer: Any) -> None:
    model = make_model()
    examples = [Example("1", "where is Ada", "Paris", "x"), Example("2", "who is in the capital of Rome", "a cat", "y")]
    items = encode(examples, tokenizer, "{prompt}", 64)
    expected = [hidden_states(model, torch.tensor([item.ids[: item.start]]))[0, -1] for item in items]
    torch.testing.assert_close(question_states(model, items).float(), torch.stack(expected), rtol=1e-5, atol=1e-5)


def test_each_question_is_read_as_its_state_says(tmp_path: Path, save_model: Case, tokenizer: Any) -> None:
    """With share=0 no question to keep gets a passage; with the states of another question all others do."""
    (tmp_path / "notes.txt").write_text("Rome is in Italy\n\nAda and Bela\n")
    file, folder = tmp_path / "s.json", str(save_model("model"))
    content = defences.write(
        file, folder, "thrust:share=0", BENCHMARK, {}, passages=tmp_path / "notes.txt", overwrite=False
    )
    assert (content["forget"], content["passages"]) == ([], ["Rome is in Italy", "Ada and Bela"])
    found = defences.read(file)
    assert found is not None
    model = ModelRef.open(folder).load().model
    split = BENCHMARK.split("retain")

    def asked(part: Split) -> Any:
        return encode_split(part, tokenizer, BENCHMARK.template, 64)

    parts = list(defences.through([found.defence], split, BENCHMARK.template))
    assert [part.template for part in parts] == ["Rome is in Italy\nQ: {prompt}\nA:", BENCHMARK.template]
    bare, retrieved = asked(split), [item for part in parts for item in asked(part)]
    known = asked(found.defence.known(split, BENCHMARK.template))
    assert {item.answer.example for item in known} == set(RETAIN)
    assert found.defence.chosen(model, known, bare, retrieved) == bare
    other = 0 if known[0].answer.example == RETAIN[1] else 1
    chosen = found.defence.chosen(model, [known[other]], bare, retrieved)
    assert chosen == [retrieved[0], bare[1]]


def test_reports_show_the_question_that_was_asked(tmp_path: Path, save_model: Case, tokenizer: Any) -> None:
    defences.write(
        tmp_path / "s.json", str(save_model("model")), "input_filter:says=No", BENCHMARK, {}, overwrite=False
    )
    found = defences.read(tmp_path / "s.json")
    assert found is not None
    split = BENCHMARK.split("forget")
    parts = list(defences.through([found.defence], split, BENCHMARK.template))
    assert [part.examples[0].prompt for part in parts] == ["No", "No"]
    item = defences.with_question(encode_split(parts[0], tokenizer, "{prompt}", 64)[0], "Where is Ada ?")
    assert item.answer.example == FORGET[0]
    assert item.answer.ids == encode_split(parts[0], tokenizer, "{prompt}", 64)[0].answer.ids


def test_models_together_answer_with_the_sum_of_their_logits(make_model: Case) -> None:
    models = [make_model(seed=0), make_model("gemma2", seed=1, hidden=8), make_model("cohere", seed=2)]
    together = Together(models, [1.0, 0.5, -0.5])
    ids_BL = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 3]])
    z = [model(input_ids=ids_BL).logits for model in models]
    expected = z[0] + 0.5 * (z[1] - z[2])
    layer = output_layer(together)
    torch.testing.assert_close(layer(hidden_states(together, ids_BL)), expected, rtol=1e-5, atol=1e-5)
    assert layer.vocabulary == 32
    assert not can_share(together, Shape.of(0, [2], [2]), range(32))


def test_an_offset_is_observed_like_a_model(make_model: Case, tokenizer: Any) -> None:
    """With the same model twice beside it nothing is added, and everything observed is the model's own."""
    model, small = make_model(), make_model(seed=1)
    served = bind("transform", "offset:weight=3")(model=model, unlearned=small, reference=small)
    split = Split("s", "forget", (Example("1", "where is Ada", "Paris", "x"), Example("2", "who", "the cat", "y")))
    items = encode_split(split, tokenizer, "{prompt}", 64)
    alone, together = (observe(LocalTarget("m", m, tokenizer), items, fields=("generations",)) for m in (model, served))
    assert alone.generations == together.generations
    for a, b in zip(alone.log_probs or (), together.log_probs or (), strict=True):
        assert a == pytest.approx(b, abs=1e-4)


def test_a_filter_on_the_output_never_completes_a_listed_answer_and_changes_nothing_else(make_model: Case) -> None:
    """Of "5 6 7" only 7 after 5 and 6 is not said; 9, an answer of one token, is said nowhere."""
    model, ids = make_model(), torch.tensor([[3, 5, 6, 4, 6, 5, 6]])
    served = bind("transform", "output_filter")(model=model, withheld=[(5, 6, 7), (9,)])
    with torch.no_grad():
        plain = output_layer(model)(hidden_states(model, ids))[0]
        filtered = output_layer(served)(hidden_states(served, ids))[0]
    is_withheld = torch.zeros_like(plain, dtype=torch.bool)
    is_withheld[[2, 6], 7] = True
    is_withheld[:, 9] = True
    torch.testing.assert_close(filtered[~is_withheld], plain[~is_withheld])
    assert (filtered[is_withheld] < plain[is_withheld] - 9000).all()


def test_a_filter_knows_the_answers_to_forget_as_tokens(save_model: Case, tmp_path: Path, tokenizer: Any) -> None:
    content = defences.write(tmp_path / "s.json", str(save_model("m")), "output_filter", BENCHMARK, {}, overwrite=False)
    assert [e["answer"] for e in content["forget"]] == [e.answer for e in BENCHMARK.split("forget").examples]
    found = defences.read(tmp_path / "s.json")
    assert found is not None
    texts = defences.answers_as_tokens(found.defence.forget, tokenizer)
    assert {tokenizer.decode(text) for text in texts} == {e.answer for e in BENCHMARK.split("forget").examples}


def test_what_a_defence_cannot_use_is_refused(tmp_path: Path, save_model: Case, cli: Case) -> None:
    model = str(save_model("model"))
    for spec, helpers, message in (
        ("input_filter", {"unlearned": model}, "no use for `unlearned`"),
        ("offset", {"unlearned": model}, "give its folder with `reference`"),
        ("thrust:share=2", {}, "out of range"),
        ("thrust", {"reference": model}, "no use for `reference`"),
    ):
        with pytest.raises(UserError, match=message):
            defences.write(tmp_path / "s.json", model, spec, BENCHMARK, helpers, overwrite=False)
    with pytest.raises(UserError, match=r"not called \*\.json"):
        defences.write(tmp_path / "s", model, "input_filter", BENCHMARK, {}, overwrite=False)
    (tmp_path / "empty.txt").write_text("\n \n")
    for spec, name, message in (
        ("input_filter", "empty.txt", "no use for `passages`"),
        ("thrust", "empty.txt", "holds no passages"),
        ("thrust", "missing.txt", "no file"),
    ):
        with pytest.raises(UserError, match=message):
            defences.write(tmp_path / "s.json", model, spec, BENCHMARK, {}, passages=tmp_path / name, overwrite=False)
    assert not (tmp_path / "s.json").exists()


@pytest.mark.parametrize("content", ["[]", '{"suppression": "input_filter"}'])
def test_a_file_of_another_kind_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text(content)
    with pytest.raises(UserError, match="holds no defence"):
        defences.read(tmp_path / "s.json")


ITEM = {"id": "1", "prompt": "where is Ada", "answer": "Paris", "fact": "1"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"forget": ["x"]}, "an item whose 'id' is missing or no text"),
        ({"forget": [{**ITEM, "prompt": 5}]}, "an item whose 'prompt' is missing or no text"),
        ({"forget": [{**ITEM, "answer": None}]}, "an item whose 'answer' is missing or no text"),
        ({"forget": []}, "no items to forget, which input_filter needs"),
        ({"suppression": "thrust", "forget": []}, "no items to retain, which thrust needs"),
        ({"passages": [5]}, "'passages' holds something that is no text"),
        ({"helpers": {"unlearned": 5}}, "'unlearned' holds something that is no text"),
    ],
    ids=range(7),
)
def test_a_damaged_defence_is_named(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    content = {
        "stillknows": "0",
        "suppression": "input_filter",
        "model": "m",
        "helpers": {},
        "forget": [ITEM],
        "retain": [],
    }
    (tmp_path / "s.json").write_text(json.dumps({**content, "passages": [], **changes}))
    with pytest.raises(UserError, match=rf"s\.json.* {words}\n"):
        defences.read(tmp_path / "s.json")


def test_a_guard_without_words_is_refused_and_icul_takes_a_question_without_any() -> None:
    silent = Example("1", "???", "Paris", "1")
    with pytest.raises(UserError, match="hold no words"):
        bind("transform", "input_filter")(forget=[silent], retain=[])
    rewrite = bind("transform", "icul:kept=0")(forget=[silent, replace(silent, answer="Rome")], retain=[])
    assert "???" in rewrite("!!!", "{prompt}")[1]


def test_files_of_the_first_version_stay_readable(tmp_path: Path, save_model: Case) -> None:
    model = str(save_model("model"))
    content = defences.write(tmp_path / "new.json", model, "input_filter:says=No", BENCHMARK, {}, overwrite=False)
    assert content.pop("defence") == "input_filter:says=No"
    former = {"suppression": "guard:says=No", **content}
    (tmp_path / "old.json").write_text(json.dumps(former))
    new, old = (defences.read(tmp_path / name) for name in ("new.json", "old.json"))
    assert new is not None
    assert new == old
    assert new.defence.bound.identity == "guard@1:says=No:threshold=0.0"  # what was observed before stays valid
    assert new.model == model
    assert new.defence.identity == defences.made_of(new.defence.bound, BENCHMARK).identity


# In chains


def test_attacks_ask_through_defences_whatever_is_written_first(tokenizer: Any) -> None:
    """Flagged questions are withheld: the attack's wordings of them as well."""
    questions = Questions(BENCHMARK, "error", 64, 64, frozenset())
    for spec in ("input_filter:says=No+frame:style=upper", "frame:style=upper+int8+input_filter:says=No"):
        variant = parse_variant(spec)
        chain = [defences.made_of(link, BENCHMARK) for link in variant.defences]
        reading = questions.reading(variant, tokenizer, chain)
        assert reading.items.keys() == {"forget"}
        expected = questions.encoded(tokenizer, chain)["forget"]
        assert [item.answer.ids for item in reading.items["forget"]] == [item.answer.ids for item in expected]
    assert parse_variant("input_filter").role == "deployment"
    assert parse_variant("input_filter+int8").asking != parse_variant("int8").asking


def test_two_defences_are_asked_one_after_the_other(tokenizer: Any) -> None:
    icul, guard = (
        defences.made_of(bind("transform", spec), BENCHMARK) for spec in ("icul:kept=0", "input_filter:says=No")
    )
    split = BENCHMARK.split("forget")
    for first, second in ((icul, guard), (guard, icul)):
        e = split.examples[0]
        expected = second.rewrite(*first.rewrite(e.prompt, BENCHMARK.template))
        part = next(defences.through([first, second], split, BENCHMARK.template))
        assert (part.examples[0].prompt, part.template) == expected


def test_what_a_chain_cannot_hold_is_refused(tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"offset needs more than the model .*\n  save it with `stillknows defend`"):
        parse_variant("int4+offset")
    thrust = defences.made_of(bind("transform", "thrust"), BENCHMARK)
    questions = Questions(BENCHMARK, "error", 64, 64, frozenset())
    with pytest.raises(UserError, match="thrust and thrust both look at the model's states"):
        questions.reading(parse_variant("thrust"), tokenizer, [thrust, thrust])


def test_an_audit_measures_a_defence_in_a_chain_on_all_models_alike(world: Any, tmp_path: Path) -> None:
    """The input filter withholds the questions to forget, from the controls as well; nothing is learned of weights."""
    request = AuditConfig(
        str(world.original),
        {"mine": str(world.original)},
        world.benchmark,
        (str(world.control),),
        "full,input_filter+int8,thrust",
    )
    result = audit.audit(request, tmp_path / "audit")
    assert {key.variant for key in result.observations} == {"full", "input_filter+int8", "thrust"}
    known = {
        (key.model, key.variant): float(np.mean([np.exp(p.mean()) for p in seen.log_probs or ()]))
        for key, seen in result.observations.items()
        if key.split == "forget"
    }
    assert known["mine", "full"] > 0.9
    for name in ("mine", "original"):
        assert known[name, "input_filter+int8"] < 0.3
    updates = {cell.variant for cell in result.cells if cell.split == "weights"}
    assert updates == {"full"}, "what a defence leaves of an update is not a number"


def test_folders_are_no_defences(tmp_path: Path) -> None:
    assert defences.read(tmp_path) is None


# End to end on a small world


@pytest.fixture
def hides(cli: Case, world: Any, tmp_path: Path) -> Case:
    """Return hides(method, *options): suppress the world's original, audit it, return how it ended and the report."""

    def run(method: str, *options: object) -> tuple[Any, dict[str, Any]]:
        file, out = tmp_path / "hidden.json", tmp_path / "audit"
        ran = cli("defend", world.original, "--benchmark", world.benchmark.spec, "--method", method, "--out", file)
        assert ran.code == 0, ran.err
        models = ["--original", world.original, "--control", world.control, "--benchmark", world.benchmark.spec]
        ran = cli("audit", file, *models, "--out", out, "--metrics", GATES, "--variants", "full,int8", *options)
        return ran, json.loads((out / "report.json").read_text()) if (out / "report.json").exists() else {}

    return run


GATES = "answer_probability,extraction_strength"


def kept(report: dict[str, Any], name: str, variant: str, split: str = "forget") -> float:
    subject = next(s for s in report["subjects"] if s["name"] == name)
    return next(
        c["value"]
        for c in subject["cells"]
        if (c["variant"], c["split"], c["metric"]) == (variant, split, "answer_probability.kept")
    )


def test_a_guard_hides_what_it_knows_and_nothing_of_the_weights(hides: Case) -> None:
    """It was made of the first wording of each question; the second one gets past it."""
    ran, report = hides("input_filter")
    assert (ran.code, report["verdict"]) == (3, "STILL KNOWS"), ran.err
    assert report["variants"] == ["full", "int8", UNDEFENDED]
    for variant in ("full", "int8"):
        assert kept(report, "hidden", variant) < 0.1
        assert kept(report, "hidden", variant, "paraphrase") > 0.5
    assert kept(report, "hidden", UNDEFENDED) == pytest.approx(1)
    subject = report["subjects"][0]
    assert subject["findings"][0]["detail"].startswith("defence by input_filter: the weights are the original's")
    assert subject["variants"][UNDEFENDED] == "STILL KNOWS"
    assert subject["defence"] == "input_filter"
    assert "hidden stands behind a defence (input_filter)" in ran.out
    assert not any(control["defence"] for control in report["subjects"][1:])
    asked = {leak["question"] for leak in subject["leaks"]}
    assert not any("cannot be answered" in question for question in asked)


def test_a_guard_that_lets_everything_through_still_knows(hides: Case) -> None:
    ran, report = hides("input_filter:threshold=1000")
    assert (ran.code, report["verdict"]) == (3, "STILL KNOWS")
    assert kept(report, "hidden", "full") == kept(report, "hidden", UNDEFENDED) == pytest.approx(1)


def test_general_tasks_are_not_asked_past_a_defence(hides: Case) -> None:
    ran, report = hides("input_filter", "--tasks", "mmlu")
    assert (ran.code, report) == (2, {})
    assert "would not be asked through a defence" in ran.err


def test_controls_are_measured_once(hides: Case, tmp_path: Path) -> None:
    hides("input_filter")
    folders = {path.name: {f.name for f in path.iterdir()} for path in (tmp_path / "audit" / "observations").iterdir()}
    assert folders == {
        "hidden": {"full", "int8", UNDEFENDED},
        "original": {"full", "int8"},
        "control": {"full", "int8"},
    }


def test_retrieval_hides_nothing_of_the_weights_and_is_named(hides: Case) -> None:
    """Every question that scores below the best known one is read with a passage about something else."""
    ran, report = hides("thrust:share=1")
    assert ran.code == 3, ran.err
    assert kept(report, "hidden", "full") < 0.9
    assert kept(report, "hidden", UNDEFENDED) == pytest.approx(1)
    assert report["subjects"][0]["defence"] == "thrust:share=1"
    assert "hidden stands behind a defence (thrust:share=1)" in ran.out


def test_in_context_unlearning_and_an_offset_go_the_whole_way(
    cli: Case, world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What they hide is measured, not promised; without them the weights are the original's."""
    files = tmp_path / "icul.json", tmp_path / "offset.json"
    spec = world.benchmark.spec
    icul = ["--method", "icul:kept=1", "--out", files[0]]
    helpers = ["--unlearned", world.control, "--reference", world.original]
    offset = ["--method", "offset", *helpers, "--out", files[1]]
    for options in (icul, offset):
        ran = cli("defend", world.original, "--benchmark", spec, *options)
        assert ran.code == 0, ran.err
    models = ["--original", world.original, "--control", world.control, "--benchmark", spec]
    out = tmp_path / "audit"
    ran = cli("audit", *files, *models, "--out", out, "--metrics", GATES, "--variants", "full")
    assert ran.code == 3, ran.err
    report = json.loads((out / "report.json").read_text())
    for name in ("icul", "offset"):
        assert kept(report, name, UNDEFENDED) == pytest.approx(1)
    assert kept(report, "icul", "full") < 0.9
    assert kept(report, "offset", "full") == pytest.approx(0, abs=0.05)  # z_o + z_c − z_o: it answers as the control
    verdicts = {s["name"]: s["verdict"] for s in report["subjects"]}
    assert verdicts["offset"] == "HIDDEN"
    assert verdicts["icul"] in ("HIDDEN", "STILL KNOWS")
    assert modelfiles.fingerprint(world.original) == report["subjects"][0]["fingerprint"]
