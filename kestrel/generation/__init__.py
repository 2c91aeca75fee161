"""Answers of adapter and base: decoding, shared prefixes, a row for every reply."""
