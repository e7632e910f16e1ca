"""Training data: tokenizers, text corpora, token shards, and the loaders that read them."""
