"""What the accuracy benchmarks share: tasks, served variants, stored responses, grading, statistics."""
