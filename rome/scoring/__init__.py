"""Scores of an edited model: probabilities, greedy answers, texts and their metrics."""
