"""Infrastructure for all other packages: errors, files, ranks, signals, devices and the compiled extension."""
