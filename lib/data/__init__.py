"""From raw rows to a dataset.

plan      which files, which columns, which fingerprint: looked at before Ray starts; `explain` tells it
build     the dataset, published whole: `stream` reads, `passes` counts and finds equal texts, `write_pass` writes
report    the dataset as a page to look at
redact    personal data out of the rows' texts, before anything else sees them
sources, queries, readers, rows, shapes, blocks      URIs and databases → files → rows with our columns → blocks of rows
quarantine                    rows and files that cannot be used
clean, dedup, near, clusters, split, cuts, weights, places   what happens to the rows of a block; none of them knows Ray
ready     what all passes make of a block
split_passes                  where splits part, by time and label by label, on Ray Data
augment   new rows for training, made of its own
near_passes                   near duplicates and what leaks between splits, on Ray Data
semantic, semantic_passes     the same by what texts mean; `embedding` is the encoder, `shuffles` what both move rows by
noise     training rows that are most likely labelled wrongly
labelling                     labels for rows that have none (`jobs.label`)
shards                        rows → tokens → Parquet
scoring   files → answers of a registered model (`jobs.score`), through the same readers
"""
