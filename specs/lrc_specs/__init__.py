"""Ready specs, named `preset:NAME`. Each is run by a test on a tiny model."""
