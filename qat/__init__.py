"""A plan to a converted model, its arms trained side by side, and a verdict with intervals."""
