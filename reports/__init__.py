"""A run directory to one self-contained HTML file. Imports no torch.

load.py reads the files, summary.py aggregates them, charts.py draws, words.py says what a chart
shows, sections.py and page.py assemble, report.py is the entry point.
"""
