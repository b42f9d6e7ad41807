"""Surveys: one call over many prompts, written to a folder of Parquet files."""
