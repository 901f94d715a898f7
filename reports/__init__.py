"""A run directory to one self-contained HTML file. Imports no torch."""
