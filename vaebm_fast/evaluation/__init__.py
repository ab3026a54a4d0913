"""Judging samples and models."""
