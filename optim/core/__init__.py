"""The frame of every optimizer: groups, one step, AdamW for the other roles, state dicts, updates during backward."""
