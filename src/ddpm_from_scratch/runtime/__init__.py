"""Foundations of all rooms: random streams, files that are whole or absent, results, devices and errors."""
