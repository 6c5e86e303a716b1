"""report.html: one self-contained page to read a run, or a sweep, from disk (`python -m pdlightning.report`)."""
