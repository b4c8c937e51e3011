"""Many simulated clients against a real broker and a real server."""
