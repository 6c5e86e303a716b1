"""Runs from elsewhere and for others: names of runs, downloads, what is trusted of them, and model cards."""
