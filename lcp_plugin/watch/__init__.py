"""A page on 127.0.0.1 that shows a run while it goes on, or how far it came; it only reads."""
