"""From raw rows to a dataset.

plan      which files, which columns, which fingerprint: looked at before Ray starts
build     the dataset, published whole; the two passes and the shuffle between them are in `passes`
redact    personal data out of the rows' texts, before anything else sees them
sources, readers, blocks      URIs → files → rows → blocks of rows
clean, dedup, near, clusters, split   what happens to the rows of a block; none of them knows Ray
near_passes                   near duplicates and what leaks between splits, on Ray Data
semantic, semantic_passes     the same by what texts mean; `embedding` is the encoder, `shuffles` what both move rows by
noise     training rows that are most likely labelled wrongly
labelling                     labels for rows that have none (`jobs.label`)
shards                        rows → tokens → Parquet
scoring   files → answers of a registered model (`jobs.score`), through the same readers
"""
