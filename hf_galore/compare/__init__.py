"""Runs side by side: read from their folders, as tables, figures and one HTML page; and the runs of a sweep."""
