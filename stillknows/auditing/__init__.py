"""What a model still knows: observed, scored, compared with controls, judged and reported."""
