"""Tokens: what a call of a model says of its tokens: which are pads, where the prompt ends, which pass runs."""
