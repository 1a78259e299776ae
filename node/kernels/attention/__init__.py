"""Attention over the paged KV cache on a GPU: one interface, several backends, chosen once at start."""
