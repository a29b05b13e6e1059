"""Documented bugs of checkpoint loaders, and defects of converters of the small and medium GPT."""
