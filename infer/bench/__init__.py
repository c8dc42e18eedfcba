"""`switchgen bench`: what switching costs, next to what it must cost (docs/performance.md)."""
