"""Text to documents to tokens to blocks; what an exported folder keeps of its source."""
