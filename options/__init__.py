"""Option files of the published recipes, and the safe, strict reading of any BasicSR option file."""
