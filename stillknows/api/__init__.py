"""The Python functions. They take what a notebook has at hand; the commands of the same names call them.

A model is a folder or a hub name, the result of `unlearn`, or a pair (model, tokenizer) that is loaded already; a pair
is first written to a temporary folder, so that everything after it is done as for any other model. A benchmark is a
name as on the command line, a `Benchmark`, or lists of dictionaries:
`{"forget": [{"question": …, "answer": …}], "retain": [{"text": …}]}`. Lists of variants, metrics, figures, tasks and
formats are sequences, or texts as on the command line. All raise UserError for bad input, before a model is loaded
where it can be seen there, and for an `out` that holds results (unless `overwrite`) or that another run works in.
"""
