"""From raw rows to a dataset.

plan, explain                 which files, which columns, which fingerprint: looked at and told before Ray starts
build                         the dataset, published whole
reading/                      URIs and databases → files → rows with our columns; what cannot be used is set aside
blocks, stream                blocks of rows, whatever files they come from; what every pass begins with
redact/                       personal data out of the rows' texts, before anything else sees them
clean, ready                  texts mended and judged; what all passes make of a block
passes, write_pass            the first pass counts and finds equal texts, the second writes
alike/                        rows that say the same: equal, nearly equal, equal in meaning
splitting/                    where a row goes, and how often training has it
places                        which rows of a block stay, and in which split, of all that was found
shuffles, embedding           how rows move between tasks; a sentence encoder as a stage
grounding                     the passages of a knowledge base before a dialogue
augment/                      new rows for training, made of its own
noise                         training rows that are most likely labelled wrongly
shards, mix                   rows → tokens → Parquet; several datasets as one
examples, report              the dataset as a page to look at
recommending/                 who did what with which item → sequences and a catalogue
labelling/                    labels for rows that have none (`jobs.label`)
scoring/                      files → answers of a registered model (`jobs.score`), through the same readers
"""
