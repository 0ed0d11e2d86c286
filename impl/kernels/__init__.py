"""Page walks as straight-line functions over words: run as they are, compiled, or symbolically."""
