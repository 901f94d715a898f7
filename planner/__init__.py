"""Statistics and a budget to a plan: which site gets which format, and why. Imports no torch."""
