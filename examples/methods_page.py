"""Write docs/methods.md from what is registered: every part of a method with its formula, options, needs and source.

python examples/methods_page.py
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from stillknows import defaults
from stillknows.formatting import markdown_table
from stillknows.kinds import METHOD_KINDS, ROLES, Kind, PluginRole
from stillknows.registry import Plugin, plugins
from stillknows.store import write_text

PAGE = Path(__file__).parents[1] / "docs" / "methods.md"
HEAD = """# Methods

Made by `python examples/methods_page.py` from the functions themselves. A method is a line of parts, joined by `+` in
any order: `stillknows unlearn MODEL --method "npo:beta=0.1 + kl + gru + sure:percentile=95"`. Objectives make up the
loss, steps change which gradient reaches which weights, edits change the weights afterwards, and a recipe is a name for
several parts. What does not go together is refused with the reason before a model is loaded.

Letters: f an item to forget, r one to retain, θ the model, θo or ref the model before, p_t the probability of answer
token t, ℓ_t = −ln p_t, z logits; sums and means run over answer tokens only.
"""
TITLES: dict[tuple[Kind, PluginRole | None], str] = {
    ("recipe", None): "Recipes: names for methods of several parts",
    ("objective", "forget"): "Forget objectives",
    ("objective", "retain"): "Retain objectives",
    ("step", "mask"): "Masks: which weights may move",
    ("step", "perturbation"): "Perturbations: where the forget gradient is taken",
    ("step", "gradient_merge"): "Gradient merges: how forget and retain gradient become one",
    ("step", "optimizer"): "Optimizers in place of AdamW",
    ("step", "adapter"): "Adapters: what is trained instead, and merged",
    ("step", "curriculum"): "Curricula: what is forgotten when",
    ("edit", None): "Edits: weights changed afterwards, or without any descent",
}


REFUSING = """
## Refusals

Parts that name `refusal_…` or `refusals` train with answers that give nothing away: those of `--refusals FILE`, one on
each line, else the benchmark's (TOFU's idontknow.jsonl, `refusals=FILE` of your own files), else these, in English:

"""


# what is published and not here: name, papers, what it takes, and what is nearest here
NOT_HERE = [
    (
        *("ELM", "2410.02760"),
        "the frozen model behind two prompts, an expert's and a novice's, which somebody has to write",
        "`exchange`; `undial`, which lowers the true token in the frozen model's distribution",
    ),
    (
        *("TAR", "2408.00761"),
        "gradients after up to 64 steps of an attacker's training, in every step",
        "`sam` (one step, in weights), `lat` (in hidden states)",
    ),
    (
        *("ULD", "2406.08607"),
        "an assistant whose logits are subtracted when the model is asked: the weights keep everything",
        "the defence `offset`, which an audit names as what it is",
    ),
    (
        *("ReLearn", "2502.11190"),
        "other answers written by a larger model",
        "`exchanged + nll`, with values of the same kind; your own texts as items to retain",
    ),
    ("MUDMAN", "2506.12484", "an adversary's copy in every step, norms of single gradients", "`disruption`, its mask"),
    (
        *("ROME, MEMIT", "2202.05262, 2210.07229"),
        "second moments of a large corpus's activations, and the subject's place in every question",
        "`lunar`, the same least squares for one matrix, with moments of the retain items",
    ),
    (
        *("EUL", "2310.20150"),
        "layers of its own in every block, fused over requests",
        "`npo + kl + lora`, one request after another with `--after`",
    ),
    (
        *("KGA", "2305.06535"),
        "two more models: one of the items to forget, one of new items like them",
        "a reinforced teacher (`whp`)",
    ),
]


def page() -> str:
    """Return the page."""
    assert set(TITLES) == {(kind, role) for kind in METHOD_KINDS for role in ROLES[kind] or (None,)}
    return HEAD + refusals() + "".join(section(kind, role) for kind, role in TITLES) + not_here()


def not_here() -> str:
    """Return which published methods are not here, and why."""
    rows = [
        [name, ", ".join(f"[{n}](https://arxiv.org/abs/{n})" for n in papers.split(", ")), takes, nearest]
        for name, papers, takes, nearest in NOT_HERE
    ]
    table = markdown_table(["method", "arXiv", "what it takes", "nearest here"], rows)
    return f"\n## Published methods that are not here, and why\n\n{table}\n"


def refusals() -> str:
    """Return where refusals come from, and the built-in ones."""
    last = "\nA plain text asks nothing: the refusal follows after its first half.\n"
    return REFUSING + "".join(f"- {text}\n" for text in defaults.REFUSALS) + last


def section(kind: Kind, role: PluginRole | None) -> str:
    """Return a table of one kind and role, and below it what each does in full."""
    known = plugins(kind, role)
    table = markdown_table(
        ["name", "options with defaults", "needs", "source"],
        [[f"`{name}`", options(p), ", ".join(f"`{n}`" for n in p.needs) or "–", p.source] for name, p in known.items()],
    )
    return f"\n## {TITLES[kind, role]}\n\n{table}\n" + "".join(f"\n{described(plugin)}\n" for plugin in known.values())


def options(plugin: Plugin) -> str:
    """Return a plug-in's options as they are typed."""
    return " ".join(f"`{name}={value}`" for name, value in plugin.options.items()) or "–"


def described(plugin: Plugin) -> str:
    """Return a plug-in's docstring as a paragraph, with its options as a list; inputs are in the table."""
    text, _, arguments = (inspect.getdoc(plugin.function) or "").partition("\n\nArgs:\n")
    arguments, _, rest = arguments.partition("\n\n")
    entries = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", arguments, re.MULTILINE)
    lines = [f"- `{name}`: {' '.join(words.split())}" for name, words in entries if name in plugin.options]
    body = "\n\n".join(" ".join(part.split()) for part in [*text.split("\n\n"), *rest.split("\n\n")] if part.strip())
    meaning = f" Stands for `{plugin.function()}`." if plugin.kind == "recipe" else ""
    return "\n".join([f"**{plugin.name}.** {body}{meaning}", *([""] if lines else []), *lines])


if __name__ == "__main__":
    write_text(PAGE, page())
