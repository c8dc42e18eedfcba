"""`switchgen serve`: an OpenAI-compatible server over the loop (docs/serving.md)."""
