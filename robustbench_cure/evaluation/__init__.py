"""The evaluation: attacks run, every success is verified, and a record is kept of each sample."""
