"""The science of editing facts in language models: one process, no Ray.

Import what you need from the modules; this package imports nothing by itself, so that a machine
without polars, nltk or scikit-learn can still edit and score.
"""
