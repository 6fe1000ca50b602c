"""Inputs that parsers must survive: a table of targets, a corpus for each, mutations, and a campaign for long runs."""
