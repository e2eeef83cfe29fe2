"""Models that a server holds: asked over HTTP, judged as models in memory are, within a budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from openai_server import MODEL, serving
from transformers import AutoTokenizer

import stillknows as sk
from stillknows.auditing.sampled import SampledTarget
from stillknows.model import endpoint as endpoints
from stillknows.model.encoding import encode
from stillknows.model.endpoint import KEY, Endpoint
from stillknows.model.endpoint_target import CountingTarget, EndpointTarget, grouped
from stillknows.model.ref import ModelRef
from stillknows.reporting.schema import Measured
from stillknows.types import Example

METRICS = "answer_probability,extraction_strength"


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client's waits between two tries are its own; here they take no time."""
    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.0)
    monkeypatch.setattr(openai._base_client, "MAX_RETRY_DELAY", 0.0)


def items(world: Any, count: int = 6) -> list[Any]:
    tokenizer = AutoTokenizer.from_pretrained(world.original)
    return encode(world.benchmark.split("forget").examples[:count], tokenizer, world.benchmark.template, 32)


def found(served: Any, world: Any) -> EndpointTarget:
    first = items(world, 1)[0]
    text = AutoTokenizer.from_pretrained(world.original).decode(list(first.ids))
    return EndpointTarget.find(Endpoint(served.url, MODEL), "mine", first, text)


@pytest.mark.parametrize("scoring", ["echo", "prompt_logprobs"])
def test_an_endpoint_scores_and_answers_as_the_model_in_memory_does(world: Any, scoring: str) -> None:
    local, asked = ModelRef.open(str(world.original)).load(), items(world)
    with serving(world.original, scoring=scoring) as served:
        target = found(served, world)
        assert (target.scoring, target.capabilities) == (scoring, frozenset({"score", "generate"}))
        theirs, ours = target.score(asked), local.score(asked)
        for i in range(len(asked)):
            assert np.allclose(theirs[i].log_probs, ours[i].log_probs, atol=1e-4)
            assert theirs[i].hits.tolist() == ours[i].hits.tolist()
        limits = [4, 4, 5, 4, 4, 4]
        assert [text.strip() for text in target.generate(asked, limits)] == local.generate(asked, limits)


@pytest.mark.parametrize("single", [False, True])
def test_samples_are_as_many_as_were_asked_for_and_differ(world: Any, single: bool) -> None:
    """From servers too that give one answer whatever they are asked for."""
    with serving(world.control, scoring="", single=single) as served:
        target = found(served, world)
        often = [item for item in items(world, 2) for _ in range(12)]
        texts = target.generate(often, [4] * len(often), 1.0, seed=3)
        assert len(texts) == len(often)
        assert len(set(texts[:12])) > 1
        served.requests.clear()
        target.generate(often, [4] * len(often), 1.0, seed=3)
        assert len(served.requests) == (12 if single else 1)


def test_a_server_of_chats_alone_is_asked_the_bare_question(world: Any) -> None:
    with serving(world.original, chat_only=True) as served:
        target = found(served, world)
        assert (target.chats, target.capabilities) == (True, frozenset({"generate"}))
        target.generate(items(world, 1), [3])
        assert served.requests[-1]["messages"] == [{"role": "user", "content": items(world, 1)[0].example.prompt}]


def audits(world: Any, model: Path, out: Path, variants: str, **how: Any) -> tuple[Any, Any]:
    """The audits of a model in memory and of the same one served, as reports on it."""
    shared: dict[str, Any] = {
        "original": world.original, "controls": [world.control], "benchmark": world.benchmark, "variants": variants,
        "metrics": METRICS, "placebos": 9,
    }  # fmt: skip
    local = sk.audit(model, **shared, out=out / "local")
    with serving(model, **how) as served:
        remote = sk.audit(endpoint=Endpoint(served.url, MODEL, samples=20), **shared, out=out / "served")
    return local.data.audited[0], remote.data.audited[0]


@pytest.mark.parametrize("whose", ["original", "control"])
def test_the_verdict_is_that_of_the_model_in_memory_where_log_probabilities_are_served(
    world: Any, tmp_path: Path, whose: str
) -> None:
    """So is every number, through an audit whose requests fail now and then."""
    local, remote = audits(
        world, getattr(world, whose), tmp_path, "full,frame", failures=[429, "cut", None, 500, None, "cut", 429]
    )
    assert (remote.verdict, remote.variants) == (local.verdict, local.variants)
    assert (remote.path.startswith(f"{MODEL} at http"), remote.run, remote.quantized) == (True, None, None)
    theirs = remote.by_place
    compared = 0
    for place, cell in local.by_place.items():
        if isinstance(cell, Measured) and place[1] != "weights":
            assert theirs[place].value == pytest.approx(cell.value, abs=2e-4), place
            compared += 1
    assert compared > 20
    assert any("its weights were not seen" in (f.detail or "") for f in remote.findings)


def test_without_log_probabilities_all_models_are_judged_by_samples(world: Any, tmp_path: Path) -> None:
    local, remote = audits(world, world.original, tmp_path, "full", scoring="")
    assert (local.verdict, remote.verdict) == ("STILL KNOWS", "STILL KNOWS")
    assert any("judged by samples, as all models here" in (f.detail or "") for f in remote.findings)
    for one in (local, remote):
        assert one.facts is not None
        assert one.facts.diffuse is not None
        assert (one.facts.diffuse.mean_rank > 0.95, one.facts.diffuse.p < one.facts.diffuse_alpha) == (True, True)


def test_what_needs_weights_is_said_not_to_be_measured(world: Any, tmp_path: Path) -> None:
    with serving(world.control) as served:
        report = sk.audit(
            endpoint=Endpoint(served.url, MODEL), original=world.original, controls=[world.control],
            benchmark=world.benchmark, variants="full,int4,relearn:steps=2,int4+frame", metrics=METRICS, placebos=0,
            out=tmp_path / "audit",
        )  # fmt: skip
    assert report.variants == ("full",)
    assert {left.variant: left.because for left in report.data.left_out} == dict.fromkeys(
        ("int4", "relearn:steps=2", "int4+frame"), "not measured: an endpoint serves no weights"
    )


def test_an_audit_that_was_refused_goes_on_where_it_was_and_the_key_is_written_nowhere(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY, "sk-very-secret")
    how: dict[str, Any] = {
        "original": world.original, "controls": [world.control], "benchmark": world.benchmark, "variants": "full",
        "metrics": METRICS, "placebos": 0, "out": tmp_path / "audit",
    }  # fmt: skip
    with serving(world.control, key="sk-very-secret", stop_after=8) as served:
        asked = Endpoint(served.url, MODEL)
        with pytest.raises(sk.UserError, match=r"refuses: .*403"):
            sk.audit(endpoint=asked, **how)
        before = len(served.requests)
        served.stop_after = float("inf")
        sk.audit(endpoint=asked, **how)
        whole = len(served.requests) - before
        served.requests.clear()
        sk.audit(endpoint=asked, **how, overwrite=True)
        assert len(served.requests) <= 2 < whole  # it asks what the server can do, and nothing again
        assert set(served.authorisations) == {"Bearer sk-very-secret"}
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or b"very-secret" not in file.read_bytes(), file


def test_the_cost_is_told_before_anything_is_asked_and_a_budget_holds(
    world: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    how: dict[str, Any] = {
        "original": world.original, "benchmark": world.benchmark, "variants": "full", "metrics": METRICS,
        "placebos": 0, "out": tmp_path / "audit",
    }  # fmt: skip
    with serving(world.control) as served:
        with pytest.raises(sk.UserError, match=r"may take \d+ requests: .* tokens read, .*more than the budget of 100"):
            sk.audit(endpoint=Endpoint(served.url, MODEL, budget=100), **how)
        assert len(served.requests) <= 2
        with caplog.at_level("INFO", "stillknows"):
            sk.audit(endpoint=Endpoint(served.url, MODEL, prices=(1000.0, 2000.0), budget=1000), **how)
        assert any("at the prices given" in text and "will be asked at most" in text for text in caplog.messages)
        told = next(text for text in caplog.messages if "will be asked at most" in text)
        assert int(told.split("at most ")[1].split(" requests")[0]) == len(served.requests) - 2 - 2


def test_a_budget_that_is_spent_on_the_way_ends_the_run(world: Any) -> None:
    with serving(world.control) as served:
        target = found(served, world)
        target.client.endpoint = Endpoint(served.url, MODEL, budget=1)
        with pytest.raises(sk.UserError, match=r"the budget for .* is spent after"):
            target.score(items(world))


def test_what_is_counted_beforehand_is_what_is_asked(world: Any) -> None:
    asked = items(world)
    often, counting = [item for item in asked for _ in range(70)], CountingTarget()
    with serving(world.control) as served:
        target = found(served, world)
        before = target.client.usage.requests, target.client.usage.read
        for one in (target, counting):
            one.score(asked)
            one.generate(often, [2] * len(often), 1.0)
            one.generate(asked, [2, 3, 2, 3, 2, 3])
        usage = target.client.usage
        assert (usage.requests - before[0], usage.read - before[1]) == (counting.usage.requests, counting.usage.read)


def test_requests_hold_what_can_be_asked_together(make_items: Any) -> None:
    """Every item once; prompts of one request are asked equally often and may write equally much."""
    asked = make_items([2, 3, 2, 2])
    asked += [asked[0]] * 130
    limits = [4, 4, 5, 4] + [4] * 130
    groups = grouped(asked, limits)
    assert sorted(i for places, _ in groups for same in places for i in same) == list(range(len(asked)))
    for places, limit in groups:
        assert len({len(same) for same in places}) == 1
        assert sum(map(len, places)) <= 64
        assert {limits[i] for same in places for i in same} == {limit}
        for same in places:
            assert len({asked[i].ids[: asked[i].start] for i in same}) == 1


def test_samples_estimate_how_likely_an_answer_is_said(world: Any) -> None:
    """The share of texts that hold it; hits where the likeliest text does; nothing for a text without a prompt."""

    class Says:
        name = fingerprint = "says"
        capabilities = frozenset({"generate"})

        def generate(self, asked: Any, limits: Any, temperature: float = 0.0, seed: int = 0) -> list[str]:
            return [("It is Rome." if temperature == 0 or i % 4 else "Paris") for i in range(len(asked))]

    tokenizer = AutoTokenizer.from_pretrained(world.original)
    examples = [Example(a, "Where ?", a, "f") for a in ("rome", "Paris", "Oslo")]
    asked = encode([*examples, Example("t", "", "Where ?", "t")], tokenizer, "{prompt}", 32)
    scores = SampledTarget(Says(), 20).score(asked)  # type: ignore[arg-type]
    assert [float(scores[i].log_probs.exp()) for i in range(3)] == pytest.approx([15.5 / 21, 5.5 / 21, 0.5 / 21])
    assert [scores[i].hits.tolist() for i in range(3)] == [[True], [False], [False]]
    assert bool(scores[3].log_probs.isnan().all())


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"url": "localhost:8000"}, "is no address"),
        ({"url": "http://me:secret@host/v1"}, "holds a key\n  put it into OPENAI_API_KEY"),
        ({"url": "http://host/v1?key=1"}, "holds a key"),
        ({"model": ""}, "name one with `model`"),
        ({"prices": (-1.0, 0.0)}, "below 0"),
        ({"samples": 1}, "`samples` 1 is out of range"),
    ],
)
def test_what_no_endpoint_is_is_refused(how: dict[str, Any], message: str) -> None:
    with pytest.raises(sk.UserError, match=message):
        Endpoint(**{"url": "http://host/v1", "model": "m"} | how)


def test_a_server_that_is_not_there_or_reads_other_tokens_is_one_message(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoints, "RETRIES", 0)
    first = items(world, 1)[0]
    with pytest.raises(sk.UserError, match=r"does not answer: .*\n  see that the server runs"):
        EndpointTarget.find(Endpoint("http://127.0.0.1:9/v1", MODEL), "mine", first, "")
    with (
        serving(world.original) as served,
        pytest.raises(sk.UserError, match=r"reads other tokens than the original: .*\n  serve a model of"),
    ):
        EndpointTarget.find(Endpoint(served.url, MODEL), "mine", first, "quite another text")


def test_the_options_of_a_command_name_an_endpoint() -> None:
    from stillknows.cli.endpoint_options import endpoint_of

    assert endpoint_of(None, None, None, None, 20) is None
    assert endpoint_of("http://h/v1", "m", "0.5/1.5", 3.0, 9) == Endpoint("http://h/v1", "m", (0.5, 1.5), 3.0, 9)
    for given, message in (
        ((None, "m", None, None, 20), "are of an endpoint"),
        (("http://h/v1", "m", "1", None, 20), "names no two prices"),
    ):
        with pytest.raises(sk.UserError, match=message):
            endpoint_of(*given)  # type: ignore[arg-type]
