"""How deep in a model knowledge is left: signals from its hidden states, between the original's and a control's."""
