"""Encodings of position that are no rotation: what is added to a token before attention."""
