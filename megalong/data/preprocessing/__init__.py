"""Text to .bin/.idx: in parallel, resumable, in parts, merged."""
