"""What the project costs beside the alternatives; every command prints its table and writes a CSV to `results/`."""
