"""Set the environment of engines before a test of this folder imports vLLM."""

from tests.support import environment  # noqa: F401
