"""From photographs to the LMDBs that BasicSR trains on."""
