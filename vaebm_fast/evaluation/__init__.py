"""Evaluation of samples and models."""
