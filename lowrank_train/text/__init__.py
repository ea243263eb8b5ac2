"""Rows of text files: readers of columns, chats, long texts, and which tokens are learned."""
