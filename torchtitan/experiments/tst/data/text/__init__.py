"""Text corpora: files, records, datasets, and the streams that training reads."""
