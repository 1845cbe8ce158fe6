"""Decoder families as small torch modules, and the loader that fills them."""
