"""Training on text that is tokenized meanwhile: files, records, datasets and streams."""
