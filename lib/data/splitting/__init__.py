"""Where a row goes, and how often training has it.

split                 by its text, or its group, and the seed
cuts, split_passes    by time and label by label: found by counting; the second module has Ray
weights               as a source weighs
"""
