"""Token shards: made once by tokenizing a corpus, read and mixed while training."""
