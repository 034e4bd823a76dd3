"""What compression does to rankings, and what it costs and saves: every kind, size and method against exact scores."""
