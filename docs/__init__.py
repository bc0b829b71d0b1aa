"""What the documentation has as data: ``results.json``, the published figures, which ``attnsr.published`` reads."""
