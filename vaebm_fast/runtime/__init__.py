"""What everything else stands on: errors, files, processes, signals, devices, and the compiled part."""
