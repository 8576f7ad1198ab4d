"""Who did what with which item → sequences, a catalogue and users.

build           the dataset of `recommend`
behaviour       rows of a source → interactions
interactions    what of them counts, and what is held out without a leak
catalogue       the tables of items and users
"""
