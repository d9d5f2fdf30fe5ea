"""Measurements of kernels, engines, accuracy and distillation: the verbs of `caprese bench`.

The folders are floors: a module imports only from its own folder and from those before it.

    results < paper < kernels < hugging_face < lora < engine < evaluation < recovery < all.py, cli.py

To add a benchmark NAME:

1. a module in the highest folder that it imports from, with KEYS, MEASURES, COLUMNS, a dataclass of settings and a
   function decorated with `results.settings.options_of` (`engine/prefix.py` is an example);
2. an entry in `cli.VERBS`, and a step in `all.STEPS` if `caprese bench all` should run it;
3. a class for its rows in `results/schemas`, in the module of its subject, and an entry in `results/schemas/files.py`;
4. a test in tests/benchmarks that runs the function in small and calls `schemas.check` on the JSON file that it writes.

A result of it in benchmarks/results/MACHINE/NAME.json is then validated by the tests and compared by `caprese bench
compare`.
"""
