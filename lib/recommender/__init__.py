"""Recommendation: which item a user will turn to next, from what items say and what users do.

items      what is known of the items of a dataset, as arrays
vectors    the encoder's vectors of their texts, computed once
model      items and histories → vectors whose product tells how well they match
ranks      where an item stands among all, and what such ranks come to
"""
