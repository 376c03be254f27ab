"""Sampling from any model: samplers by name, generation over processes, editing and previews."""
