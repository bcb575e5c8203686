"""Downstream re-ID: data, evaluation, supervised and unsupervised training."""
