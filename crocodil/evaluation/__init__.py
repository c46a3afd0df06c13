"""Metrics, costs and the report."""
