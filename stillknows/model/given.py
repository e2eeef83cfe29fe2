"""What stands for a decoder in the pass that makes logits of hidden states; see layers.OutputLayer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Given(nn.Module):
    """Stands for a decoder and its parts: gives the hidden states that it was given, and the decoder's plain values."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.hidden_BLD: Tensor | None = None
        self.parts = {name for name, _ in decoder.named_children()}
        own = vars(self)
        own.update({name: value for name, value in vars(decoder).items() if name[0] != "_" and name not in own})

    def __getattr__(self, name: str) -> Any:
        return self if name in vars(self).get("parts", ()) else super().__getattr__(name)

    def forward(self, *given: Any, **named: Any) -> Output:
        return Output((self.hidden_BLD,))


class Output(tuple):
    """What a decoder gives out, by place and by name; what it may give besides (a cache, losses of experts) is None."""

    def __getattr__(self, name: str) -> Any:
        return self[0] if name == "last_hidden_state" else None
