"""What every room stands on: random streams, files that are whole or absent, results, devices and errors."""
