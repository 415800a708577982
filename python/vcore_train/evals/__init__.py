"""Evaluation of models on public benchmarks, through lm-evaluation-harness (docs/evaluation.md)."""
