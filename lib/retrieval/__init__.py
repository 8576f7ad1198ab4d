"""A knowledge base: documents → passages → an index that answers are grounded in.

plan       which documents, which encoder, which fingerprint: looked at before Ray starts
documents  URIs → files → titles and blocks of text (markup: Markdown and HTML; pdf)
chunks     blocks → passages of bounded length
embedding  texts → vectors
build      the index, published whole, on Ray Data
index      what lies in storage: versions, the pointer to the current one, the Lance table
search     full text, vectors, and both fused
measures   recall and nDCG of rankings
"""
