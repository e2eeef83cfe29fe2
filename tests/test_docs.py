"""The worked examples of CONTRIBUTING.md run, register, and pass through the engine."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from stillknows import registry
from stillknows.errors import NotMeasured
from stillknows.kinds import KINDS, ROLES
from stillknows.training.loop import fit
from stillknows.training.objective_inputs import Term
from stillknows.training.settings import Settings
from stillknows.types import Benchmark, Example, Observations, Split
from stillknows.unlearning.method import parse
from stillknows.variants.compress import parse_variant, quantize
from stillknows.variants.variant import parse_variant as parse_attack

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def examples():
    """Run every block of the page; what it registers is taken back afterwards."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    registry.load_own()
    before = {kind: dict(known) for kind, known in registry._plugins.items()}
    for block in blocks:
        exec(compile(block, "CONTRIBUTING.md", "exec"), {"__name__": "contributing"})
    yield blocks
    for kind, known in before.items():
        registry._plugins[kind].clear()
        registry._plugins[kind].update(known)


def test_there_is_an_example_of_each_kind(examples):
    found = {re.search(r'@register\("(\w+)"(?:, role="(\w+)")?', block).groups() for block in examples}
    assert {kind for kind, _ in found} == set(KINDS)
    assert {role for kind, role in found if kind == "transform"} == set(ROLES["transform"])


def test_the_term_is_an_objective(examples):
    log_probs = torch.tensor([[-1.0, -2.0, 0.0]], requires_grad=True)
    mask = torch.tensor([[True, True, False]])
    loss = registry.bind("objective", "unlikelihood:weight=2")(log_probs=log_probs, mask=mask)
    loss.sum().backward()
    p, q = np.exp(-1.0), np.exp(-2.0)
    assert loss.item() == pytest.approx(-np.log((1 - p) * (1 - q)))
    assert log_probs.grad[0].tolist() == pytest.approx([p / (1 - p), q / (1 - q), 0.0])


def test_the_mask_lets_vectors_move_alone(examples, make_model, make_items):
    model = make_model("gpt2")
    start = {name: w.clone() for name, w in model.named_parameters()}
    terms = [Term(registry.bind("objective", "ga"), make_items([3, 2]))]
    fit(model, terms, Settings(lr=1e-2, max_steps=2), step_plugins=[registry.bind("step", "vectors")])
    for name, w in model.named_parameters():
        assert torch.equal(w, start[name]) == (w.dim() > 1), name


def test_the_quantizer_is_a_variant(examples):
    values = quantize(torch.tensor([[1.0, -3.0]]), parse_variant("bf16+binary")).values_OI
    assert values.tolist() == [[2.0, -2.0]]


def test_the_attack_words_questions_otherwise(examples):
    split = Split("forget", "forget", (Example("a", "Who?", "Ada", "a"),))
    found = parse_attack("slowly:words=Please.").worded(split, Benchmark("mine", (split,), "{prompt}"))
    assert [framed.examples[0].prompt for framed in found.values()] == ["Who? Please."]


def test_the_metric_scores(examples):
    assert registry.bind("metric", "least_token")(log_probs=[np.log([0.5, 0.25])]).tolist() == [0.25]


def test_the_figure_is_made_of_two_splits(examples):
    """Mean losses of (1 + 3)/2 and (.5 + .5 + 2)/3 nats; without unseen texts there is none."""
    subject = {"forget": losses(0.5, 0.5, 2), "holdout": losses(1, 3)}
    [(name, found)] = registry.bind("metric", "loss_gap")(subject=subject, control=None).items()
    assert (name, found.value, found.n) == ("loss_gap", pytest.approx(1), 3)
    assert 1 - 2 < found.low < 1 < found.high <= 3 - 0.5
    with pytest.raises(NotMeasured, match="the split 'holdout' was not measured"):
        registry.bind("metric", "loss_gap")(subject={"forget": losses(1)}, control=None)


def losses(*values):
    """Observations of answers of two tokens with these mean losses, each its own fact."""
    names = tuple(f"item {i}" for i in range(len(values)))
    return Observations(names, names, names, names, log_probs=tuple(np.array([0.0, -2 * x]) for x in values))


def test_the_edit_and_the_recipe_run(examples, make_model):
    model, start = make_model(), {name: p.detach().clone() for name, p in make_model().named_parameters()}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    registry.bind("edit", "halfway:share=0.25")(model=model, original=start)
    assert all(torch.allclose(p, start[name] + 0.25) for name, p in model.named_parameters())
    assert [part.plugin.name for part in parse("careful:beta=0.2").parts] == ["npo", "kl", "halfway"]


def test_the_defence_withholds_the_questions_to_forget(examples):
    forget, retain = (Example(name, f"Who is {name} ?", "x", name) for name in ("Ada", "Bob"))
    rewrite = registry.bind("transform", "blocklist")(forget=[forget], retain=[retain])
    assert [rewrite(e.prompt, "{prompt}")[0] for e in (forget, retain)] == ["No .", "Who is Bob ?"]


def test_the_benchmark_binds(examples):
    benchmark = registry.bind("benchmark", "tables:forget=8")()
    assert [len(split.examples) for split in benchmark.splits] == [9, 72]
    assert benchmark.split("forget").examples[1].answer == "16"


def test_every_link_of_the_documentation_leads_somewhere():
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert "://" in target or (page.parent / target).exists(), f"{page.name}: {target}"
