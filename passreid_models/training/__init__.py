"""What every trainer of the package shares: configuration, run folder, loop, signals, device."""
