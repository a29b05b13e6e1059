"""Other right ways to load the small and medium GPT and compute their function."""
