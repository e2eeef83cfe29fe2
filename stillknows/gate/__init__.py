"""Whether a model may be released: each fact tested against answers that could as well have been true."""
