"""Evaluation: the generation pass, the judge, metrics and the report."""
