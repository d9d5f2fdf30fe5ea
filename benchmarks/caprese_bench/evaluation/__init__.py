"""Benchmarks of a served model's answers: tasks, served variants, stored responses, grading."""
