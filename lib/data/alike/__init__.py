"""Rows that say the same.

dedup                        equal texts, by hash
near, near_passes            nearly equal ones, by MinHash; the second module has Ray, as `semantic_passes`
semantic, semantic_passes    those of one meaning, by an encoder's vectors
clusters                     linked rows, directly or through others: which stays, and in which split all are
"""
