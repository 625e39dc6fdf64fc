"""Tokenizers: extended by the pieces of a language, without dead ones, and compared on texts.

Byte-level and sentencepiece BPE, read from and written to folders."""
