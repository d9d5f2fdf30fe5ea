"""The format of every result file: what each column of each benchmark's rows holds, and in which unit.

`caprese bench validate FILE...` checks files against it; `json_schema(name)` gives it as a JSON Schema. The rows of a
new benchmark get a class in the module of their subject and an entry in `files.ROWS`.
"""

from .files import ROWS, Provenance, ResultFile, check, file_model, json_schema

__all__ = ["ROWS", "Provenance", "ResultFile", "check", "file_model", "json_schema"]
