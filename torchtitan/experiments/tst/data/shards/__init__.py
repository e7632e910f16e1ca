"""Token shards: a corpus is tokenized once; training reads and mixes the shards."""
