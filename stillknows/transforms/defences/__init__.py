"""Defences: what stands before or beside a model whose weights are left as they are.

One kind is given `forget` and `retain`, the items, and returns a function (question, template) -> (question, template):
what the model reads in the place of a question. Another is given `model`, with `unlearned` and `reference` where it
names them, and returns a model that answers in its place. The third is given `known_ND` and `asked_MD`, the model's
last hidden states of questions to keep and of those that it is asked, and says which are read with a passage before.
"""

from stillknows.transforms.defences import gates, logits, prompts

__all__ = ["gates", "logits", "prompts"]
