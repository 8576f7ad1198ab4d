"""From URIs to rows with our columns.

sources, queries    URIs, folders and globs → files; a SELECT → a file
readers, rows       the rows of one file, and what cannot be read of it; `csv_files`, `json_files`, `arrow_files`,
                    `plain_text`, `conll` and `chatterbot` know a format each
shapes              a file's columns → those of the task
quarantine          rows and files that cannot be used, up to a share
preferences         the sample of preferences, which is made
"""
