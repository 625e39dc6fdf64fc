"""Models that were trained, for others to use: an OpenAI-compatible HTTP server, and a chat on the terminal."""
