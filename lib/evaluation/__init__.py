"""How good a model is, on rows that it never saw: metrics, baselines, intervals, plots, a report page.

Pure functions on arrays wherever possible; `scoring` alone knows Ray, `plots` alone knows matplotlib.
Shapes: N rows of a split, C classes, B calibration bins, S bootstrap resamples.
"""
